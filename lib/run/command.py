"""What every job's command line is: python -m jobs.NAME --config F [--index I] [key=value ...]"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from lib.base.advice import about
from lib.base.errors import UserError
from lib.config.frozen import digest_of
from lib.config.loading import overrides_of
from lib.run.experiment import Experiment
from lib.run.site import Site, apply, site
from lib.store import Cell

Kind = TypeVar("Kind", bound=Experiment)
T = TypeVar("T")
Load = Callable[[Path, list[str]], Experiment]  # lib.families.load


@dataclass(frozen=True)
class Job:
    experiment: Experiment
    config: Path
    site: Site
    index: int | None
    tasks: str  # what the indices stand for, by lib.run.task.freeze; '' by plain sbatch, or by hand
    update: bool
    overrides: tuple[str, ...] = ()
    _kept: dict[str, tuple[object, object]] = field(default_factory=dict)

    def of(self, kind: type[Kind]) -> Kind:
        if not isinstance(self.experiment, kind):
            own = self.experiment
            raise UserError(
                f"{self.config} is of kind {own.kind}: submit it with `make {own.submit}`, then `make {own.results}`"
            )
        return self.experiment

    def cells(self) -> list[Cell]:
        return self.experiment.cells(self.site.cache, self.site.scratch)

    @property
    def folder(self) -> Path:
        return self.site.scratch / self.experiment.label

    def chosen(self) -> int:
        """This array index."""
        if self.index is not None:
            return self.index
        text, last = os.environ.get("SLURM_ARRAY_TASK_ID", ""), len(self.experiment.names()) - 1
        if not text:
            raise UserError(f"which cell? give --index 0-{last}, or submit as an array")
        if not text.isdecimal() or len(text) > 9:
            raise UserError(f"SLURM_ARRAY_TASK_ID={text[:40]!r} is no array index; submit as an array, or give --index")
        return int(text)

    def keep(self, what: str, key: object, make: Callable[[], T]) -> T:
        """What make() returns, made once for all cells of this process that give the same key; another one frees it."""
        if what not in self._kept or self._kept[what][0] != key:
            self._kept.pop(what, None)
            self._kept[what] = key, make()
        return cast(T, self._kept[what][1])


def natural(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or len(text) > 9:
        raise ValueError
    return int(text)


def digest_of_all(cells: list[Cell]) -> str:
    """One digest for an experiment: it changes with any cell's."""
    return digest_of({cell.name: cell.digest for cell in cells})


def job(name: str, description: str, load: Load, argv: list[str] | None = None, indexed: bool = True) -> Job:
    """Parse the command line, load the configuration, apply the site."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{name}", description=description)
    parser.add_argument("--config", type=Path, required=True, help="configs/*.yaml")
    parser.add_argument("--set", default="", help="overrides in one text, parted and quoted as in a shell")
    if indexed:
        parser.add_argument("--index", type=natural, help="task, default $SLURM_ARRAY_TASK_ID")
        parser.add_argument("--tasks", default="", help="what was frozen of this array at its submission")
    else:
        parser.add_argument("--update", action="store_true", help="look again what a branch like main stands for")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.dtype=float32 max_rows=64")
    args = parser.parse_intermixed_args(argv)
    here = site()
    apply(here)
    overrides = [*overrides_of(args.set), *args.overrides]
    about(args.config, overrides)
    experiment = load(args.config, overrides)
    index, tasks, update = (getattr(args, name, None) for name in ("index", "tasks", "update"))
    return Job(experiment, args.config, here, index, tasks or "", bool(update), tuple(overrides))
