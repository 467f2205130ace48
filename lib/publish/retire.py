"""Students' earlier epochs, removed from scratch once nothing needs them: what asks them is done, and, where they are
published, so is that. Their markers stay and say so; the last epoch stays whole."""

from dataclasses import dataclass, field
from pathlib import Path

from lib.base.errors import UserError
from lib.lora.epochs import by_epoch, states_of
from lib.preferences.experiment import Preferences
from lib.publish.experiment import Publish
from lib.run.extent import extent
from lib.run.parents import made_again
from lib.store import Cell, retire
from lib.store.markers import drop_retired


@dataclass
class Retired:
    """What became of one student's epochs."""

    student: str
    epochs: list[int] = field(default_factory=list)
    bytes: int = 0
    left: str = ""  # why some, or all, stay

    def line(self, dry: bool) -> str:
        done = f"{'would free' if dry else 'freed'} {self.bytes / 1e6:,.3g} MB, {_epochs(self.epochs)}"
        return f"{self.student}: " + "; ".join([*([done] if self.epochs else []), *([self.left] if self.left else [])])


def retire_epochs(preferences: Preferences, publish: Publish | None, cache: Path, scratch: Path, dry: bool) -> int:
    """`publish`: where the earlier epochs are to be published first."""
    students = preferences.source
    if publish and publish.source.label != students.label:
        theirs = publish.source.label
        raise UserError(f"{publish.origin} publishes {theirs}, and {preferences.origin} asks {students.label}")
    if publish and publish.epochs != "all":
        raise UserError(f"{publish.origin} publishes the last epoch alone; say epochs=all, or leave PUBLISH out")
    asked = {cell.name: cell for cell in preferences.cells(cache, scratch)}
    published = {cell.name: cell for cell in publish.cells(cache, scratch)} if publish else {}
    found = []
    for student in students.cells(cache, scratch):
        needed_by = [asked[student.name], *([published[student.name]] if publish else [])]
        found.append(_retire(preferences, student, needed_by, dry))
    for one in found:
        print(one.line(dry))
    size, count = sum(one.bytes for one in found), sum(bool(one.epochs) for one in found)
    left = sum(bool(one.left) for one in found)
    print(f"{'would free' if dry else 'freed'} {size / 1e6:,.3g} MB of {count} students; something is left of {left}")
    return 0


def _retire(preferences: Preferences, student: Cell, needed_by: list[Cell], dry: bool) -> Retired:
    found, schedule = Retired(student.name), preferences.source.schedule()
    found.left = "; ".join(filter(None, [_unfinished(student), *map(_unfinished, needed_by)]))
    if found.left:
        return found
    there = by_epoch(states_of(student), schedule)
    if not dry:
        drop_retired(list(there.values()))  # what a kill has left of those that are gone already
    earlier = {epoch: one for epoch, one in there.items() if epoch < schedule.epochs and not one.retired}
    if never := sorted(set(earlier) - set(preferences.epochs_used)):
        found.left = f"{_epochs(never)} left: {preferences.label} does not ask {'it' if len(never) == 1 else 'them'}"
    why = "asked and published" if len(needed_by) > 1 else "asked"
    for epoch, state in sorted(earlier.items()):
        if epoch not in never and (dry or retire(state, why, ", ".join(cell.spoken for cell in needed_by))):
            found.epochs.append(epoch)
            found.bytes += state.bytes
    if not earlier:
        found.left = "nothing to free: its earlier epochs are gone already"
    return found


def _unfinished(cell: Cell) -> str:
    """Why what a cell holds cannot be relied on; '' where it is done, from what its parents hold now."""
    now = extent(cell)
    if not now.whole:
        return f"left: {cell.spoken} is not done ({now.done} of {cell.total})"
    if again := made_again(cell, [piece for piece, _ in now.pieces]):
        return f"left: {cell.spoken} was made from another copy of {', '.join(again)}"
    return ""


def _epochs(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"epochs {numbers[0]}-{numbers[-1]}"
    return f"epoch{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
