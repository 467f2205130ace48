"""What every export begins and ends with: the cells that are done, merged; and a word about those that are not."""

from collections.abc import Sequence
from pathlib import Path

from lib.base.errors import UserError
from lib.run.command import Job
from lib.run.extent import extent
from lib.store import Cell, merge
from lib.store.columns import Schema
from lib.store.merge import merged_is_current


def merged_files(this: Job) -> dict[Cell, Path]:
    """Of each cell that is done."""
    schema, config = this.experiment.schema(this.site.cache), this.experiment.science_json()
    done = [cell for cell in this.cells() if extent(cell).whole]
    return {cell: merged_file(cell, schema, config) for cell in done}


def merged_file(cell: Cell, schema: Schema, config: str) -> Path:
    """Of a cell that is done; made again only where it is not there: it may hold tens of GB."""
    return cell.path / "merged.h5" if merged_is_current(cell, schema) else merge(cell, schema, config)


class Unfinished(UserError):
    """Results that lack what is not done yet, and nothing else."""


def all_done(cells: Sequence[Cell], done: Sequence[Cell]) -> None:
    """An error that names what an export lacks."""
    if missing := [cell.name for cell in cells if cell not in done]:
        raise Unfinished(
            f"{len(missing)} of {len(cells)} cells are not done and not exported: {', '.join(missing)}; "
            "run `make resume`"
        )
