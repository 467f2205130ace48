"""One at a time: whoever comes second waits, for as long as the first lives and no longer."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import wait_until
from tools import ROOT

from lib.base.turns import SILENT_SECONDS, one_at_a_time

HOLD = """
import sys, time
from pathlib import Path
from lib.base.turns import one_at_a_time
with one_at_a_time(Path(sys.argv[1]), "it"):
    print("in", flush=True)
    time.sleep(600)
"""
ADD = """
import sys, time
from pathlib import Path
from lib.base.turns import one_at_a_time
lock, counter = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(5):
    with one_at_a_time(lock, "it"):
        number = int(counter.read_text())
        time.sleep(0.02)
        counter.write_text(str(number + 1))
"""


@contextmanager
def waiting(lock: Path) -> Iterator[threading.Event]:
    """Somebody who wants to come in; the event says that he has been."""
    been = threading.Event()

    def enter() -> None:
        with one_at_a_time(lock, "it"):
            been.set()

    thread = threading.Thread(target=enter)
    thread.start()
    yield been
    thread.join(60)
    assert not thread.is_alive()


def test_two_processes_never_meet(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("0")
    command = [sys.executable, "-c", ADD, str(tmp_path / "lock"), str(tmp_path / "n")]
    for process in [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]:
        assert process.wait() == 0
    assert (tmp_path / "n").read_text() == "15" and [p.name for p in tmp_path.iterdir()] == ["n"]


def test_who_was_killed_holds_nothing_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout.readline() == "in\n"
        with waiting(lock) as been:
            assert not been.wait(2.5)
            one.send_signal(signal.SIGKILL)  # and is not asked after, as in a container that has no init
            assert been.wait(30)
    said = capsys.readouterr().out
    assert said.count("is at it; waiting") == 1 and str(lock) in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("who", ['{"user": "ann", "host": "far", "process": "far-0-1-1"}', "nonsense", "[" * 10**5])
def test_who_cannot_be_seen_from_here_is_gone_after_a_silence(tmp_path: Path, who: str) -> None:
    lock = tmp_path / "lock"
    lock.mkdir()
    (lock / "a.json").write_text(who)
    with waiting(lock) as been:
        assert not been.wait(2.5)
        now = (lock / "a.json").stat().st_mtime
        os.utime(lock / "a.json", (now, now - SILENT_SECONDS - 5))
        assert been.wait(30)
    assert not list(tmp_path.iterdir())


def test_an_empty_lock_is_nobodys_and_only_the_own_one_is_given_back(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.mkdir()
    with one_at_a_time(lock, "it"):
        (mine,) = lock.iterdir()
        assert json.loads(mine.read_text())["user"]
        mine.rename(lock / "another.json")  # as if it had been cleared away, and somebody else had come
    assert [p.name for p in lock.iterdir()] == ["another.json"]


def test_a_living_holder_is_never_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.base.turns.TOUCH_SECONDS", 0.05)
    with one_at_a_time(tmp_path / "lock", "it"):
        (mine,) = (tmp_path / "lock").iterdir()
        os.utime(mine, (1, 1))
        wait_until(lambda: mine.stat().st_mtime > 1, 10, "it is touched")
