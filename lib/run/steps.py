"""The loop over steps: work that has an order, such as a training. Its state is committed as a folder now and then, and
a start goes on from the last one that holds, so that a run which was killed ends with the bytes of one that was not.

    <cell>/step-00000100.json, step-00000100-1f3a5c7e9b/     the state after 100 steps"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from lib.base.errors import DONE, REQUEUE
from lib.base.loading import uncollected
from lib.base.progress import Progress
from lib.run.extent import settled, state_name, states, step_of, steps_done
from lib.run.heartbeat import Heartbeat
from lib.run.lifecycle import Notice, Totals, live, provenance
from lib.run.parents import without_older_parents
from lib.store import Cell, Folder, commit_folder, retire, scan_folders
from lib.store.folders import sweep_folders
from lib.store.markers import Facts, drop_retired, set_aside, sweep

BEAT_SECONDS = 10.0
Keep = Literal["all", "last"] | Sequence[int]


class StepKernel(Protocol):
    """What a job trains. All that decides the next step is in the folder, the state of random generators too."""

    def restore(self, folder: Path | None, step: int) -> None:
        """The state after so many steps; no folder: the beginning. May be called again."""
        ...

    def advance(self) -> Facts:
        """One step; numbers among its facts are summed between two states, of texts the last stays."""
        ...

    def snapshot(self) -> Callable[[Path], None]:
        """What writes the present state into a folder, while the next steps are made."""
        ...


def run_steps(
    cell: Cell,
    make_kernel: Callable[[], tuple[StepKernel, Mapping[str, Any]]],
    *,
    every: int,
    keep: Keep = "last",
    log_seconds: float,
    gpus: int,
) -> int:
    """Bring a cell to its last step, or to the signal that stops it. A state is committed after every so many steps,
    those that `keep` lists, and the last; what is not to be kept is retired once a newer one holds. A state's first
    marker wins: a copy that comes second with other bits goes on from what is there."""
    if every < 1 or cell.total < 1:
        raise ValueError(f"{cell.total} steps, a state every {every}: both are from 1 up")

    cell = settled(cell)

    def work(beat: Heartbeat, notice: Notice) -> int:
        return _Steps(cell, every, keep, beat, notice).work(make_kernel, log_seconds)

    return live(cell, gpus, "step", "committed states", work)


@dataclass
class _Steps:
    cell: Cell
    every: int
    keep: Keep
    beat: Heartbeat
    notice: Notice
    made: dict[str, Any] = field(default_factory=dict)

    def work(self, make_kernel: Callable[[], tuple[StepKernel, Mapping[str, Any]]], log_seconds: float) -> int:
        cell = self.cell
        sweep(cell.path)
        sweep_folders(cell.path)
        self._last(tell=True)
        step = steps_done(cell, self._states())
        print(f"cell {cell.index} ({cell.name}): {step} of {cell.total} steps done", flush=True)
        if step == cell.total:
            self._tidy(step)
            return DONE
        with uncollected("transformers"):
            kernel, about = make_kernel()
        self.made = {**provenance(self.beat, cell), **about}
        self.beat.facts["loaded"] = time.time()
        progress = Progress(cell.total, step, unit="steps", every=log_seconds)
        try:
            return self._go(kernel, progress)
        finally:
            progress.close()

    def _go(self, kernel: StepKernel, progress: Progress) -> int:
        step, totals, since, facts = self._restore(kernel), Totals(), time.monotonic(), _Facts()
        said = float("-inf")
        with ThreadPoolExecutor(1) as behind:  # a state is written while the next steps are made
            writing: Future[Folder] | None = None
            while True:
                ends = step == self.cell.total or self.notice.came
                if ends or self._is_due(step):
                    writing, before = None, writing
                    if before and self._is_anothers(before.result()):
                        step, since, facts = self._restore(kernel), time.monotonic(), _Facts()
                        continue
                    if ends and not facts:
                        break
                    if facts:
                        seconds = round(time.monotonic() - since, 3)
                        writing = behind.submit(self._commit, kernel.snapshot(), step, seconds, facts)
                        since, facts = time.monotonic(), _Facts()
                    if ends:
                        continue
                if time.monotonic() - said > BEAT_SECONDS:
                    said = time.monotonic()
                    self.beat.beat("running", rows_done=step)
                new = kernel.advance()
                facts.add(new)
                totals.count(new)
                step += 1
                progress.add(1)
        totals.say()
        return DONE if step == self.cell.total else REQUEUE

    def _commit(self, save: Callable[[Path], None], step: int, seconds: float, facts: Facts) -> Folder:
        about = {"seconds": seconds, "made": self.made, "facts": facts, "sampled": True}
        found = commit_folder(self.cell.path, self.cell.digest, state_name(step), save, **about)
        self._tidy(step)
        return found

    def _is_anothers(self, state: Folder) -> bool:
        """Another copy wrote it first, so that what was made since goes on from other bits."""
        last = self._last() if state.adopted else None
        return last is not None and step_of(last) >= step_of(state)

    def _restore(self, kernel: StepKernel) -> int:
        """From the last state that holds. Another copy may retire it meanwhile: then there is a later one."""
        while True:
            last = self._last()
            step = step_of(last) if last else 0
            try:
                kernel.restore(last.folder if last else None, step)
            except Exception:
                if last is None or last in self._states():
                    raise
            else:
                return step

    def _last(self, tell: bool = False) -> Folder | None:
        done, bad = scan_folders(self.cell.path, self.cell.digest, deep=True)
        if steps_done(self.cell, states(self.cell, done)) < self.cell.total:
            done, older = without_older_parents(self.cell, done)
            bad += older
        for one in bad if tell else []:
            print(f"{one.path.stem} does not hold: {one.reason}; it is done again", flush=True)
        set_aside(bad)
        drop_retired(done)
        return max((piece for piece in states(self.cell, done) if not piece.retired), key=step_of, default=None)

    def _states(self) -> list[Folder]:
        return states(self.cell, scan_folders(self.cell.path, self.cell.digest)[0])

    def _is_due(self, step: int) -> bool:
        wanted = not isinstance(self.keep, str) and step in self.keep
        return step % self.every == 0 or step == self.cell.total or wanted

    def _tidy(self, newest: int) -> None:
        """Retire states before the newest that are not to be kept; `all`: what a warning left between."""
        for piece in self._states():
            step = step_of(piece)
            wanted = self._is_due(step) if self.keep == "all" else self.keep != "last" and step in self.keep
            if step < newest and not wanted and not piece.retired:
                retire(piece, "a later state holds", state_name(newest))


class _Facts(dict[str, int | float | str]):
    """Of the steps between two states."""

    def add(self, new: Facts) -> None:
        for key, value in new.items():
            before = self.get(key, 0)
            self[key] = value if isinstance(value, str) or isinstance(before, str) else before + value
