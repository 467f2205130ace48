"""A student's states on scratch, by the epochs that they end."""

import hashlib
from collections.abc import Iterable

from lib.base.atomic import read_file
from lib.base.errors import UserError
from lib.lora.schedule import Schedule
from lib.run.extent import states, step_of
from lib.store import Cell, Folder, scan_folders


def states_of(student: Cell) -> list[Folder]:
    """In their order, retired ones too."""
    return states(student, scan_folders(student.path, student.digest)[0])


def by_epoch(found: Iterable[Folder], schedule: Schedule) -> dict[int, Folder]:
    """Without those inside an epoch."""
    return {schedule.epoch_of(step_of(one)): one for one in found if not step_of(one) % schedule.steps_an_epoch}


def file_of(state: Folder, name: str) -> bytes:
    """Its bytes, which are those that were written."""
    path, data = state.folder / name, read_file(state.folder / name)
    if hashlib.sha256(data).hexdigest() != next(file.sha256 for file in state.files if file.path == name):
        raise UserError(f"{path} has changed since it was written; run `make verify`")
    return data
