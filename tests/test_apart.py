"""A process apart: it answers, fails in one sentence, has limits, and ends with the one that made it."""

import gc
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import wait_until

from lib.base.errors import UserError
from lib.base.loading import uncollected
from lib.models import apart
from lib.models.apart import Apart


class Work:
    def __init__(self) -> None:
        self.calls = 0

    def pid(self) -> int:
        return os.getpid()

    def count(self, text: str) -> tuple[int, str]:
        self.calls += 1
        return self.calls, text

    def refuse(self) -> None:
        raise UserError("this is wrong; do that")

    def break_(self) -> None:
        raise KeyError("unexpected")

    def sleep(self) -> None:
        time.sleep(1000)

    def spin(self) -> None:
        while True:
            pass

    def fill(self) -> int:
        return len(bytearray(apart.MEMORY + (1 << 40)))

    def collects(self) -> bool:
        return gc.isenabled()

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_calls_keep_the_object_and_their_order():
    work = Apart(Work, "work")
    assert work.ask("pid")() == work.pid != os.getpid()
    big = "x" * 3_000_000
    work.ask("count", big)  # an answer that nobody waits for
    assert work.ask("count", "b")() == (2, "b")
    assert work.ask("count", big)() == (3, big)


def test_it_collects_garbage_though_it_is_made_while_a_task_loads():
    with uncollected("no_such_module"):
        work = Apart(Work, "work")
        assert not gc.isenabled() and work.ask("collects")()


def test_errors_pass_as_what_they_are():
    work = Apart(Work, "work")
    with pytest.raises(UserError, match=r"^this is wrong; do that$"):
        work.ask("refuse")()
    with pytest.raises(RuntimeError, match="KeyError: 'unexpected'"):
        work.ask("break_")()
    with pytest.raises(UserError, match="no memory is left"):
        work.ask("fill")()
    assert work.ask("count", "a")() == (1, "a")  # it goes on after each


def refuse_to_begin() -> None:
    raise UserError("no beginning")


def test_what_cannot_be_made_says_why():
    with pytest.raises(UserError, match="no beginning"):
        Apart(refuse_to_begin, "work").ask("count", "")()


@pytest.mark.parametrize("method", ["spin", "sleep"])
def test_what_takes_too_long_is_ended(monkeypatch, method):
    monkeypatch.setattr(apart, "SECONDS", 0.5)
    work = Apart(Work, "the template")
    with pytest.raises(UserError, match=r"the template takes longer than 1 s .* mend it, or choose another model"):
        work.ask(method)()
    assert not Path(f"/proc/{work.pid}").exists()
    with pytest.raises(UserError, match="ended the process"):
        work.ask("count", "")()


def test_one_that_was_killed_says_how_it_ended():
    with pytest.raises(UserError, match=r"work ended the process that runs it \(exit code -9\)"):
        Apart(Work, "work").ask("kill")()


def test_signals_for_the_job_are_not_its_affair():
    work = Apart(Work, "work")
    work.ask("pid")()
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(work.pid, signum)
        assert work.ask("count", "a")()[1] == "a"
    wait = work.ask("spin")  # TERM ends what is under way, but leaves the parent time to see its own
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(work.pid, signal.SIGTERM)
    with pytest.raises(UserError):
        wait()
    assert time.monotonic() - began > apart.GRACE - 1.5


def test_it_goes_when_nobody_holds_it():
    work = Apart(Work, "work")
    pid = work.ask("pid")()
    del work
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


def test_it_ends_with_the_process_that_made_it():
    """Killed outright, while the one apart is at work."""
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        works = [Apart(Work, "work") for _ in range(2)]
        pids = [work.ask("pid")() for work in works]
        for work in works:
            work.ask("spin")
        os.write(write, repr(pids).encode())
        time.sleep(1000)
        os._exit(0)
    pids = [int(pid) for pid in os.read(read, 100).decode().strip("[]").split(",")]
    assert not any(map(is_gone, pids))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(read), os.close(write)
    wait_until(lambda: all(map(is_gone, pids)), 10, "a process outlived its parent")
