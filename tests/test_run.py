"""The loop under fire: kill -9, signals, two copies at once, other shard sizes; the merge stays the same bytes."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from conftest import wait_until
from numpy_job import ROWS, SCHEMA, cell_in, columns
from test_store import in_small_mount
from tools import ROOT

from lib.run import rows
from lib.store import merge, scan
from lib.store.columns import to_hdf5


def start(folder: Path, **env: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "numpy_job.py"), str(folder)],
        env={**os.environ, **{k: str(v) for k, v in env.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = job.communicate(timeout=60)
    return job.returncode, out


def wait_for_shards(folder: Path, n: int) -> None:
    wait_until(lambda: shard_count(folder) >= n, 7.5, "no shard", every=0.005)


def shard_count(folder: Path) -> int:
    return len(list(cell_in(folder).path.glob("[!.]*.json")))


def states(folder: Path) -> list[str]:
    return [json.loads(p.read_text())["state"] for p in sorted((folder / "run" / "tasks").glob("[!.]*.json"))]


@pytest.fixture(scope="module")
def uninterrupted() -> bytes:
    """What the merged file must be, from the kernel's own definition in one piece."""
    one = cell_in(Path("/nowhere"))
    return to_hdf5(SCHEMA, columns(0, ROWS), {"digest": one.digest, "cell": one.name, "rows": ROWS, "config": ""})


def test_killed_at_random_points_and_cut_anew_each_time_gives_the_same_bytes(tmp_path, uninterrupted):
    dice, kills = random.Random(7), 0
    while kills < 8:
        before = shard_count(tmp_path)
        job = start(tmp_path, SHARD_ROWS=dice.choice([3, 7, 10, 16]), SHARD_SECONDS=0.1)
        wait_for_shards(tmp_path, before + dice.randint(0, 3))
        time.sleep(dice.uniform(0, 0.2))
        assert job.poll() is None, "the job was too quick to be killed"
        job.kill()
        finish(job)
        kills += 1
    code, out = finish(start(tmp_path))
    assert code == 0, out
    assert merge(cell_in(tmp_path), SCHEMA, "").read_bytes() == uninterrupted
    assert not list(cell_in(tmp_path).path.glob(".tmp-*"))


def test_the_warning_signal_finishes_the_shard_and_asks_for_a_requeue(tmp_path, uninterrupted):
    job = start(tmp_path, SHARD_SECONDS=0.4)
    wait_for_shards(tmp_path, 1)
    job.send_signal(signal.SIGSTOP)
    before = shard_count(tmp_path)
    job.send_signal(signal.SIGUSR1)
    job.send_signal(signal.SIGCONT)
    code, out = finish(job)
    done, bad = scan(cell_in(tmp_path).path, cell_in(tmp_path).digest, deep=True)
    assert code == 75 and not bad, out
    assert 1 <= len(done) - before <= 2, out  # the one in hand, and one that was being written
    assert states(tmp_path) == ["requeue"]
    code, out = finish(start(tmp_path))
    assert code == 0 and f"{10 * len(done)} of 400 rows done, {40 - len(done)} shards to do" in out
    assert merge(cell_in(tmp_path), SCHEMA, "").read_bytes() == uninterrupted


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_termination_stops_at_once_and_keeps_what_is_whole(tmp_path, signum):
    job = start(tmp_path, SHARD_SECONDS=100)
    while not (out := job.stdout.readline()).startswith("cell"):
        assert out, "it ended early"
    time.sleep(0.3)
    began = time.monotonic()
    job.send_signal(signum)
    code, out = finish(job)
    assert code == 128 + signum and time.monotonic() - began < 30  # of 100
    assert re.search(r"stopped by SIG(TERM|INT): finished shards are kept", out)
    assert states(tmp_path) == ["terminated"]


def test_a_cell_whose_folder_is_removed_in_the_middle_is_not_done(tmp_path):
    job = start(tmp_path, SHARD_SECONDS=0.05)
    wait_for_shards(tmp_path, 3)
    shutil.rmtree(cell_in(tmp_path).path)
    code, out = finish(job)
    assert code == 2 and "Traceback" not in out
    assert re.search(r"error: \d+ of 400 are gone, although they were committed: .* `make resume` does them again", out)
    assert states(tmp_path) == ["failed"]


def test_two_copies_at_once_both_end_well(tmp_path, uninterrupted):
    jobs = [start(tmp_path, SHARD_ROWS=size, SHARD_SECONDS=0.02) for size in (10, 10, 16)]
    assert [finish(job)[0] for job in jobs] == [0, 0, 0]
    assert merge(cell_in(tmp_path), SCHEMA, "").read_bytes() == uninterrupted


def test_copies_that_sample_see_what_was_there_first(tmp_path):
    jobs = [start(tmp_path, SAMPLED=1, SHARD_SECONDS=0.02) for _ in range(3)]
    ended = [finish(job) for job in jobs]
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert "another copy was first with other bits; its are kept" in "".join(out for _, out in ended)
    first = merge(cell_in(tmp_path), SCHEMA, "").read_bytes()
    assert len(list(cell_in(tmp_path).path.glob("0*.h5"))) == shard_count(tmp_path) - 1 == 40  # and merged.json
    assert finish(start(tmp_path, SAMPLED=1))[0] == 0 and merge(cell_in(tmp_path), SCHEMA, "").read_bytes() == first


def test_a_broken_shard_is_said_set_aside_and_done_again(tmp_path, uninterrupted):
    assert finish(start(tmp_path))[0] == 0
    done, _ = scan(cell_in(tmp_path).path, cell_in(tmp_path).digest)
    data = bytearray(done[4].file.read_bytes())
    data[-9] ^= 1
    done[4].file.write_bytes(data)
    code, out = finish(start(tmp_path))
    assert code == 0
    assert "shard 00000040-00000050 does not hold: " in out and "it is done again" in out and "1 shards to do" in out
    assert merge(cell_in(tmp_path), SCHEMA, "").read_bytes() == uninterrupted


def test_a_shard_is_written_while_the_next_one_is_computed(tmp_path, monkeypatch):
    """Each commit but the last ends only once the next shard's kernel has begun: without an overlap it never would."""
    begun, overlapped = threading.Semaphore(0), []
    commit = rows.commit

    class Kernel:
        def prepare(self, start: int, stop: int) -> tuple[int, int]:
            return start, stop

        def compute(self, prepared: tuple[int, int]) -> tuple[dict, dict]:
            if prepared[0]:
                begun.release()
            return columns(*prepared), {}

    def late(path: Path, digest: str, start: int, stop: int, *more: object, **about: object) -> object:
        overlapped.append(stop == ROWS or begun.acquire(timeout=5))
        return commit(path, digest, start, stop, *more, **about)

    monkeypatch.setattr(rows, "commit", late)
    code = rows.run_cell(cell_in(tmp_path), SCHEMA, lambda: (Kernel(), {}), shard_rows=100, log_seconds=0.0, gpus=0)
    assert code == 0 and overlapped == [True] * 4 and shard_count(tmp_path) == 4


def test_nothing_left_to_do_starts_no_kernel(tmp_path):
    assert finish(start(tmp_path))[0] == 0
    began = time.monotonic()
    code, out = finish(start(tmp_path, SHARD_SECONDS=100))
    assert code == 0 and "0 shards to do" in out and time.monotonic() - began < 30


def test_a_log_gets_plain_lines_without_carriage_returns(tmp_path):
    _, out = finish(start(tmp_path))
    assert "\nin all: rows computed 400\n" in out  # numbers are summed, texts are not
    assert re.search(r"^rows 400/400 100% [\d.e+]+ rows/s eta 0:00$", out, re.M) and "\r" not in out


def test_a_terminal_gets_a_bar(tmp_path):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    command = [sys.executable, str(ROOT / "tests" / "numpy_job.py"), str(tmp_path)]
    with subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL) as job:
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
    assert job.returncode == 0 and b"\r" in shown and b"400/400" in shown


def test_a_disk_that_fills_up_ends_the_job_in_one_sentence_and_keeps_its_shards(tmp_path, uninterrupted):
    job = f"import runpy, sys; sys.argv = ['job', '{tmp_path}/run']; "
    job += "runpy.run_path('tests/numpy_job.py', run_name='__main__')"
    listing = f"import pathlib; print(len(list(pathlib.Path('{tmp_path}').rglob('*.h5'))), 'files')"
    code = f"import subprocess, sys; print('rc', subprocess.run([sys.executable, '-c', {job!r}]).returncode); {listing}"
    done = in_small_mount(tmp_path, "size=100k", code)
    assert "No space left on device" in done.stderr and "`make resume` goes on" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "rc 2\n" in done.stdout and 3 < int(re.search(r"^(\d+) files$", done.stdout, re.M)[1]) < 40


def test_a_warning_that_comes_after_the_work_changes_nothing(tmp_path):
    code, out = finish(start(tmp_path, LATE_SIGNAL=int(signal.SIGUSR1)))
    assert code == 0 and states(tmp_path) == ["done"], out
    assert finish(start(tmp_path, LATE_SIGNAL=int(signal.SIGTERM)))[0] == -signal.SIGTERM
