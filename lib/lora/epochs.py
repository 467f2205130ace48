"""A student's states on scratch, by the epochs that they end."""

from collections.abc import Iterable

from lib.lora.schedule import Schedule
from lib.run.extent import states, step_of
from lib.store import Cell, Folder, scan_folders


def states_of(student: Cell) -> list[Folder]:
    """In their order, retired ones too."""
    return states(student, scan_folders(student.path, student.digest)[0])


def by_epoch(found: Iterable[Folder], schedule: Schedule) -> dict[int, Folder]:
    """Without those inside an epoch."""
    return {schedule.epoch_of(step_of(one)): one for one in found if not step_of(one) % schedule.steps_an_epoch}
