"""A student's adapters on scratch, each believed only after its bytes were looked at."""

from lib.base.errors import UserError
from lib.lora.epochs import by_epoch, file_of, states_of
from lib.lora.metrics import CONFIG, WEIGHTS
from lib.lora.schedule import Schedule
from lib.models.engine import Adapter
from lib.run.parents import read_from
from lib.store import Cell, Folder


def states_at(student: Cell, schedule: Schedule, epochs: list[int]) -> dict[int, Folder]:
    """A student's states after these epochs, all of which are there."""
    there, found = by_epoch(states_of(student), schedule), {}
    for epoch in epochs:
        state = there.get(epoch)
        if state is None or state.retired:
            why = f"was deleted on purpose ({state.retired.why})" if state and state.retired else "is not there"
            raise UserError(
                f"the adapter of epoch {epoch} of {student.spoken} {why}: ask without it, e.g. epochs=last, or train "
                "this student again"
            )
        found[epoch] = state
    return found


def adapters_of(student: Cell, schedule: Schedule, epochs: list[int]) -> dict[int, Adapter]:
    found = {}
    for epoch, state in states_at(student, schedule, epochs).items():
        for name in (WEIGHTS, CONFIG):
            file_of(state, name)
        sha256 = next(file.sha256 for file in state.files if file.path == WEIGHTS)
        found[epoch] = Adapter(f"{student.name}-epoch-{epoch}-{sha256[:16]}", str(state.folder))
    return found


class Unchanged:
    """What a cell reads from, when it is begun: its markers say so of all its rows."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.was = cell, read_from(cell)

    def __bool__(self) -> bool:
        return read_from(self.cell) == self.was

    def check(self) -> None:
        now = read_from(self.cell)
        if again := [name for name, sha in self.was.items() if now[name] != sha]:
            raise UserError(
                f"another copy of {', '.join(again)} was made while {self.cell.spoken} was asked: run `make resume`, "
                "which asks anew what was asked of the older one"
            )
