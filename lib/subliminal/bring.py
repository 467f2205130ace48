"""Results of another machine's run: cells that are whole there, under the digests that this configuration gives them.

They are copied beside their place, read to the last byte, and only then put into it; what is here already stays."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lib.base.advice import advised
from lib.base.atomic import check_room, listed, open_file, sync_folder, temporary
from lib.base.errors import UserError, some
from lib.cluster.pipeline import requests_of
from lib.cluster.send import Request
from lib.run.command import Job
from lib.run.extent import Extent, extent
from lib.run.pipeline import Pipeline
from lib.store import Cell, Folder, Piece
from lib.store.columns import Schema
from lib.store.markers import sweep

BLOCK = 1 << 20


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
    try:
        is_there = source.is_dir()
    except OSError as e:
        raise UserError(f"FROM={source} cannot be looked at ({e.strerror}): ask whose it is, or say another") from None
    if not is_there:
        raise UserError(f"FROM={source} is no folder: say where the other machine's scratch lies, or its copy by rsync")
    if source.resolve() == this.site.scratch.resolve():
        raise UserError(f"FROM={source} is this scratch itself")
    requests = requests_of(pipeline, this.site)
    known = [one.experiment.kind for one in requests]
    if wrong := set(kinds) - set(known):
        raise UserError(f"STAGES: {', '.join(sorted(wrong))} is none of {', '.join(known)}")
    wanted = [one for one in requests if not kinds or one.experiment.kind in kinds]
    held, labels = {path.name: path for path in listed(source)}, [one.experiment.label for one in wanted]
    if held.keys().isdisjoint(labels):
        there = some(name for name, path in held.items() if _has_cells(path)) or "no experiment"
        raise UserError(f"FROM={source} holds none of {', '.join(labels)} (there is: {there}): check FROM, RUN_ID")
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
    if not every.brought + every.here + every.begun:
        raise UserError(
            f"FROM={source} holds no cell that is wanted here ({every.others} of other settings or models): check "
            "FROM, and that both checkouts have the same configuration and models"
        )
    if every.begun:
        raise UserError(advised(f"{every.begun} cells were begun here: end them with `make resume`, or delete them"))
    return 0


def _has_cells(folder: Path) -> bool:
    with suppress(OSError):  # somebody else's
        return (folder / "cells").is_dir()
    return False


class Unreadable(Exception):
    """What is there and cannot be copied."""


def _stage(one: Request, source: Path) -> tuple[Count, list[str]]:
    count, bad, schema = Count(), [], one.experiment.schema(one.site.cache)
    sweep(one.folder / "cells")
    theirs = {path.name: path for path in listed(source / one.experiment.label / "cells")}
    for cell in one.cells:
        if cell.path.exists():
            whole = extent(cell).whole
            count.here, count.begun = count.here + whole, count.begun + (not whole)
        elif there := theirs.get(cell.path.name):
            try:
                why = _copy(cell, there, schema)
            except Unreadable as e:
                why = str(e)
            if why:
                bad.append(f"{cell.name}: {why}")
            else:
                count.brought += 1
        else:
            count.missing += 1
            count.others += any(name[:-8] == f"{cell.name}-" for name in theirs)
    return count, bad


def _copy(cell: Cell, theirs: Path, schema: Schema) -> str:
    """'' where it is here now, perhaps by another call that was quicker; else why it is not."""
    try:
        there = extent(replace(cell, path=theirs))
    except UserError as e:
        return str(e)
    if why := _not_whole(there):
        return why
    with temporary(cell.path) as new:
        check_room(cell.path, sum(piece.bytes for piece, _ in there.pieces if not piece.retired))
        new.mkdir()
        for piece, _ in there.pieces:
            _copy_piece(piece, new)
        if why := _not_whole(extent(replace(cell, path=new), deep=True, schema=schema)):
            return why
        for folder in (*(path for path in new.rglob("*") if path.is_dir()), new):
            sync_folder(folder)
        try:
            new.rename(cell.path)
        except OSError:
            if not cell.path.is_dir():
                raise
    return ""


def _not_whole(found: Extent) -> str:
    if found.bad:
        return f"{found.bad[0].path.name}: {found.bad[0].reason}"
    return "" if found.whole else f"is not done there ({found.done} of {_total(found)})"


def _total(found: Extent) -> int | str:
    return "?" if found.left is None else found.done + sum(stop - start for start, stop in found.left)


def _copy_piece(piece: Piece, new: Path) -> None:
    """What its marker vouches for, and nothing else that may lie there."""
    _copy_file(piece.path, new / piece.path.name)
    if piece.retired:
        return
    if not isinstance(piece, Folder):
        _copy_file(piece.data, new / piece.data.name)
        return
    (new / piece.data.name).mkdir()
    for file in piece.files:
        target = new / piece.data.name / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(piece.data / file.path, target)


def _copy_file(path: Path, target: Path) -> None:
    with _reading(path):
        source = open_file(path)
    with source, target.open("xb") as f:
        while True:
            with _reading(path):
                data = source.read(BLOCK)
            if not data:
                break
            f.write(data)
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What their disk says is no word about ours."""
    try:
        yield
    except OSError as e:
        raise Unreadable(f"{path.name} cannot be read: {e.strerror}") from None
