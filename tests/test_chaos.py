"""Whatever machines and people do to an array on a real Slurm, in any order: no cell is in two tasks, and in the end
every cell is done, with the rows that an undisturbed run has.

SUITE_CHAOS_SECONDS (default 20) and SUITE_CHAOS_SEED choose how long, and what."""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
from chains import Chain, repository_with_chain
from conftest import wait_until

SECONDS, SEED = float(os.environ.get("SUITE_CHAOS_SECONDS", "20")), int(os.environ.get("SUITE_CHAOS_SEED", "1"))
TRAITS = ("ant", "bee", "cow", "doe", "elk", "fly")
ROWS, CELLS = 40, "run.cells=2"


class Chaos(Chain):
    def __init__(self, *arguments, dice: random.Random) -> None:
        super().__init__(*arguments)
        self.dice, self.dead, self.said = dice, [], []

    def count(self, command: str, *more: str) -> str:
        self.said.append(f"$ {command} {more}\n{self.call(command, 'count', CELLS, *more)}")
        return self.said[-1]

    def queue(self) -> list[tuple[str, str, str]]:
        """(task, state, its array's frozen name) of all that is queued or running."""
        out = self.slurm.run("squeue", "-h", "-r", "-n", "count", "-o", "%i|%T|%k")
        return [tuple(line.split("|")) for line in out.splitlines()]

    def doubled(self) -> list[str]:
        cells: list[str] = []
        for task, _, comment in self.queue():
            frozen = self.scratch / "count" / "arrays" / f"{comment.partition(':')[2]}.json"
            cells += json.loads(frozen.read_text())["cells"][task.partition("_")[2]]
        return [cell for cell, times in Counter(cells).items() if times > 1]

    def some_task(self, *states: str) -> str | None:
        tasks = [task for task, state, _ in self.queue() if state in states]
        return self.dice.choice(tasks) if tasks else None

    def some_file(self, pattern: str) -> Path | None:
        files = sorted((self.scratch / "count" / "cells").glob(f"*/{pattern}"))
        return self.dice.choice(files) if files else None

    def tell(self, *command: str) -> None:
        with suppress(AssertionError):  # what it is about may have ended meanwhile
            self.slurm.run(*command)

    # What happens.

    def kill_a_process(self) -> None:
        beats = [json.loads(p.read_text()) for p in (self.scratch / "count" / "tasks").glob("[!.]*.json")]
        for beat in self.dice.sample(beats, min(1, len(beats))):
            command = Path(f"/proc/{beat['pid']}/cmdline")
            if command.exists() and b"run_chain" in command.read_bytes():
                os.kill(beat["pid"], signal.SIGKILL)

    def requeue(self) -> None:
        if task := self.some_task("RUNNING"):
            self.tell("scontrol", "requeue", task)

    def warn(self) -> None:
        if task := self.some_task("RUNNING"):
            self.tell("scancel", "--batch", "--signal=USR1", task)

    def hold(self) -> None:
        if task := self.some_task("PENDING"):
            self.tell("scontrol", "hold", task)

    def release(self) -> None:
        for task, _, _ in self.queue():
            self.tell("scontrol", "release", task)

    def lose_a_node(self) -> None:
        if not self.dead:
            self.dead = ["n2"]
            self.slurm.kill_node("n2")

    def find_the_node(self) -> None:
        while self.dead:
            self.slurm.revive_node(self.dead.pop())

    def break_a_file(self) -> None:
        if path := self.some_file(self.dice.choice(["*.h5", "[!.]*.json"])):
            with suppress(FileNotFoundError):
                data = path.read_bytes()
                self.dice.choice(
                    [
                        lambda: path.write_bytes(data[: len(data) // 2]),
                        lambda: path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
                        path.unlink,
                    ]
                )()

    def cancel(self) -> None:
        self.count("cancel")

    def resume(self) -> None:
        self.count("resume")

    def submit(self) -> None:
        self.count("submit", f"--array={self.dice.randrange(3)}-{self.dice.randrange(3, 6)}")

    def verify(self) -> None:
        self.count("verify")


EVENTS: list[tuple[Callable[[Chaos], None], int]] = [
    (Chaos.kill_a_process, 4),
    (Chaos.requeue, 3),
    (Chaos.warn, 3),
    (Chaos.hold, 1),
    (Chaos.release, 1),
    (Chaos.lose_a_node, 1),
    (Chaos.find_the_node, 1),
    (Chaos.break_a_file, 4),
    (Chaos.cancel, 1),
    (Chaos.resume, 4),
    (Chaos.submit, 4),
    (Chaos.verify, 1),
]


def rows_of(chaos: Chaos, trait: str) -> np.ndarray:
    """All rows of a cell, by its markers, wherever its shards were cut."""
    found = np.full(ROWS, np.nan)
    for path in chaos.cell("count", trait).glob("[!.]*.json"):
        marker = json.loads(path.read_text())
        with h5py.File(path.with_name(marker["file"])) as f:
            found[marker["start"] : marker["stop"]] = f["x"][:]
    return found


def test_whatever_happens_no_cell_is_doubled_and_all_are_done_right(fresh_slurm, tmp_path):
    print(f"SUITE_CHAOS_SEED={SEED} SUITE_CHAOS_SECONDS={SECONDS}")
    repository = repository_with_chain(tmp_path / "suite")
    (tmp_path / "scratch").mkdir()
    chaos, happened = Chaos(fresh_slurm, repository, tmp_path / "scratch", *TRAITS, dice=random.Random(SEED)), []
    chaos.count("submit")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        (event,) = chaos.dice.choices([e for e, _ in EVENTS], [n for _, n in EVENTS])
        happened.append(event.__name__)
        event(chaos)
        assert not chaos.doubled(), (happened, *chaos.said[-3:])
        time.sleep(chaos.dice.random())
    chaos.find_the_node()

    def all_done() -> bool:
        chaos.release()
        chaos.count("verify")  # what was broken without a trace is found by reading it
        chaos.count("resume")
        assert not chaos.doubled(), (happened, *chaos.said[-3:])
        return not chaos.queue() and "0 rows are not done" in chaos.count("verify")

    wait_until(all_done, 60, lambda: f"{happened}\n" + "\n".join(chaos.said[-4:]), every=1.0)
    for trait in TRAITS:
        assert np.array_equal(rows_of(chaos, trait), np.cos(len(trait) + ord(trait[0]) + np.arange(ROWS))), trait
