"""Results of another machine's run: cells that are whole there, under the digests that this configuration gives them.

They are copied beside their place, read to the last byte, and only then put into it; what is here already stays."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib.base.atomic import disk_errors
from lib.base.errors import UserError
from lib.cluster.pipeline import requests_of
from lib.cluster.send import Request
from lib.run.command import Job
from lib.run.extent import extent
from lib.run.pipeline import Pipeline
from lib.store import Cell


@dataclass
class Count:
    brought: int = 0
    here: int = 0
    missing: int = 0
    others: int = 0  # under other digests


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
    wrong_cells = 0
    for one in requests:
        if kinds and one.experiment.kind not in kinds:
            continue
        count, bad = _stage(one, source)
        wrong_cells += len(bad)
        others = f", {count.others} of other settings or models" if count.others else ""
        known = f"{count.brought} brought, {count.here} here already, {count.missing} not there{others}"
        print(f"{one.experiment.label}: {known}")
        for text in bad:
            print(f"  {text}")
    if wrong_cells:
        raise UserError(f"{wrong_cells} cells do not hold there and were left: run `make verify` on that machine")
    return 0


def _stage(one: Request, source: Path) -> tuple[Count, list[str]]:
    count, bad = Count(), []
    for cell in one.cells:
        theirs = source / one.experiment.label / "cells" / cell.path.name
        if cell.path.exists():
            count.here += 1
        elif not theirs.is_dir():
            count.missing += 1
            count.others += any(theirs.parent.glob(f"{cell.name}-????????"))
        elif why := _copy(cell, theirs):
            bad.append(f"{cell.name}: {why}")
        else:
            count.brought += 1
    return count, bad


def _copy(cell: Cell, theirs: Path) -> str:
    """'' where it is here now; else why it is not."""
    beside = cell.path.with_name(f".{cell.path.name}.{os.getpid()}")
    with disk_errors(cell.path):
        try:
            shutil.copytree(theirs, beside)
            found = extent(replace(cell, path=beside), deep=True)
            if found.bad:
                return f"{found.bad[0].path.name}: {found.bad[0].reason}"
            if not found.whole:
                return f"is not done there ({found.done} of {'?' if cell.rows is None else cell.rows})"
            for path in (*beside.rglob("*"), beside):
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            beside.rename(cell.path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return ""
