"""Results of another machine's run: cells that are whole there, under the digests that this configuration gives them.

They are copied beside their place, read to the last byte, and only then put into it; what is here already stays."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib.base.advice import advised
from lib.base.atomic import listed, open_file, sync_folder, temporary
from lib.base.errors import UserError, some
from lib.cluster.pipeline import requests_of
from lib.cluster.send import Request
from lib.run.command import Job
from lib.run.extent import extent
from lib.run.pipeline import Pipeline
from lib.store import Cell
from lib.store.columns import Schema
from lib.store.markers import sweep


@dataclass
class Count:
    brought: int = 0
    here: int = 0
    begun: int = 0  # here, and not whole
    missing: int = 0
    others: int = 0  # under other digests

    def text(self) -> str:
        begun = f", {self.begun} begun here and left as they are" if self.begun else ""
        others = f", {self.others} of other settings or models" if self.others else ""
        return f"{self.brought} brought, {self.here} here already{begun}, {self.missing} not there{others}"


def bring(this: Job, source: Path, kinds: Sequence[str]) -> int:
    """`source`: the other scratch root. `kinds`: of stages, all without."""
    pipeline = this.of(Pipeline)
    if not source.is_dir():
        raise UserError(f"FROM={source} is no folder: say where the other machine's scratch lies, or its copy by rsync")
    if source.resolve() == this.site.scratch.resolve():
        raise UserError(f"FROM={source} is this scratch itself")
    requests = requests_of(pipeline, this.site)
    known = [one.experiment.kind for one in requests]
    if wrong := set(kinds) - set(known):
        raise UserError(f"STAGES: {', '.join(sorted(wrong))} is none of {', '.join(known)}")
    wanted = [one for one in requests if not kinds or one.experiment.kind in kinds]
    if not any((source / one.experiment.label).is_dir() for one in wanted):
        there = some(path.name for path in listed(source) if (path / "cells").is_dir())
        labels = ", ".join(one.experiment.label for one in wanted)
        raise UserError(
            f"FROM={source} holds none of {labels} (there is: {there or 'no experiment'}): check FROM, RUN_ID"
        )
    every, wrong_cells = Count(), 0
    for one in wanted:
        count, bad = _stage(one, source)
        print("\n  ".join([f"{one.experiment.label}: {count.text()}", *bad]), flush=True)
        every = Count(*(a + b for a, b in zip(vars(every).values(), vars(count).values(), strict=True)))
        wrong_cells += len(bad)
    if wrong_cells:
        raise UserError(
            f"{wrong_cells} cells are not whole in {source} and were left: copy them again, or run `make verify` there"
        )
    if every.begun:
        raise UserError(advised(f"{every.begun} cells were begun here: end them with `make resume`, or delete them"))
    return 0


class Unreadable(Exception):
    """What is there and cannot be copied."""


def _stage(one: Request, source: Path) -> tuple[Count, list[str]]:
    count, bad, schema = Count(), [], one.experiment.schema(one.site.cache)
    sweep(one.folder / "cells")
    for cell in one.cells:
        theirs = source / one.experiment.label / "cells" / cell.path.name
        if not cell.path.exists() and theirs.is_dir():
            try:
                why = _copy(cell, theirs, schema)
            except Unreadable as e:
                why = str(e)
            if why:
                bad.append(f"{cell.name}: {why}")
            else:
                count.brought += 1
        elif cell.path.exists():
            whole = extent(cell).whole
            count.here, count.begun = count.here + whole, count.begun + (not whole)
        else:
            count.missing += 1
            count.others += any(theirs.parent.glob(f"{cell.name}-????????"))
    return count, bad


def _copy(cell: Cell, theirs: Path, schema: Schema) -> str:
    """'' where it is here now, perhaps by another call that was quicker; else why it is not."""
    with temporary(cell.path) as new:
        new.mkdir()
        for path in sorted(theirs.rglob("[!.]*")):  # a hidden one is being written
            _copy_one(path, new / path.relative_to(theirs))
        found = extent(replace(cell, path=new), deep=True, schema=schema)
        if found.bad:
            return f"{found.bad[0].path.name}: {found.bad[0].reason}"
        if not found.whole:
            return f"is not done there ({found.done} of {'?' if cell.rows is None else cell.rows})"
        for folder in (*(path for path in new.rglob("*") if path.is_dir()), new):
            sync_folder(folder)
        try:
            new.rename(cell.path)
        except OSError:
            if not cell.path.is_dir():
                raise
    return ""


def _copy_one(path: Path, target: Path) -> None:
    if path.is_dir():
        target.mkdir(exist_ok=True)
        return
    try:
        source = open_file(path)
    except OSError as e:
        raise Unreadable(f"{path.name} cannot be read: {e.strerror}") from None
    with source, target.open("xb") as f:
        shutil.copyfileobj(source, f, 1 << 20)
        f.flush()
        os.fsync(f.fileno())
