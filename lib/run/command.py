"""What every job's command line is: python -m jobs.NAME --config F [--index I] [key=value ...]"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lib.base.advice import about
from lib.base.errors import UserError
from lib.config.frozen import digest_of
from lib.config.loading import overrides_of
from lib.run.experiment import Experiment
from lib.run.site import Site, apply, site
from lib.store import Cell

Kind = TypeVar("Kind", bound=Experiment)
Load = Callable[[Path, list[str]], Experiment]  # lib.families.load


@dataclass(frozen=True)
class Job:
    experiment: Experiment
    config: Path
    site: Site
    index: int | None
    expected: str
    update: bool

    def of(self, kind: type[Kind]) -> Kind:
        if not isinstance(self.experiment, kind):
            own = self.experiment
            raise UserError(
                f"{self.config} is of kind {own.kind}: submit it with `make {own.submit}`, then `make {own.results}`"
            )
        return self.experiment

    def cells(self) -> list[Cell]:
        return self.experiment.cells(self.site.cache, self.site.scratch)

    def cell(self) -> Cell:
        """The cell of this array index."""
        cells = self.cells()
        index = self.index if self.index is not None else os.environ.get("SLURM_ARRAY_TASK_ID")
        if index is None:
            raise UserError(f"which cell? give --index 0-{len(cells) - 1}, or submit as an array")
        if not 0 <= int(index) < len(cells):
            raise UserError(
                f"index {index}: {self.config} has cells 0-{len(cells) - 1} ({', '.join(c.name for c in cells)})"
            )
        cell = cells[int(index)]
        if self.expected and not digest_of_all(cells).startswith(self.expected):
            raise UserError(
                f"{self.config}, its inputs or the kernel changed since this job was submitted "
                f"(digest {digest_of_all(cells)[:8]}, submitted as {self.expected}); submit again"
            )
        return cell


def digest_of_all(cells: list[Cell]) -> str:
    """One digest for an experiment: it changes with any cell's."""
    return digest_of({cell.name: cell.digest for cell in cells})


def job(name: str, description: str, load: Load, argv: list[str] | None = None, indexed: bool = True) -> Job:
    """Parse the command line, load the configuration, apply the site."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{name}", description=description)
    parser.add_argument("--config", type=Path, required=True, help="configs/*.yaml")
    parser.add_argument("--set", default="", help="overrides in one text, parted and quoted as in a shell")
    if indexed:
        parser.add_argument("--index", type=int, help="cell, default $SLURM_ARRAY_TASK_ID")
        parser.add_argument("--expect", default="", help="refuse to run when the experiment's digest is another")
    else:
        parser.add_argument("--update", action="store_true", help="look again what a branch like main stands for")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.dtype=float32 max_rows=64")
    args = parser.parse_intermixed_args(argv)
    here = site()
    apply(here)
    overrides = [*overrides_of(args.set), *args.overrides]
    about(args.config, overrides)
    experiment = load(args.config, overrides)
    index, expected, update = (getattr(args, name, None) for name in ("index", "expect", "update"))
    return Job(experiment, args.config, here, index, expected or "", bool(update))
