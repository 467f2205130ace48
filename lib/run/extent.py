"""How far a cell is, in rows or in steps: its pieces, what does not hold, and what is left."""

import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from lib.store import Cell, Folder, Marker, Piece, gaps, scan, scan_folders
from lib.store.columns import Schema
from lib.store.markers import Bad
from lib.store.shards import MOST_ROWS

T = TypeVar("T")
STATE = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Extent:
    pieces: list[tuple[Piece, int]]  # with the rows, or steps, that each stands for
    bad: list[Bad]
    left: list[tuple[int, int]] | None  # ranges of rows, or steps; None: how many there are is not known yet
    retired: list[Piece]  # whose bytes a reader may miss

    @property
    def whole(self) -> bool:
        return self.left == []

    @property
    def done(self) -> int:
        return sum(rows for _, rows in self.pieces)


@dataclass(frozen=True)
class Found:
    """What one scan of a cell's folder has found."""

    shards: list[Marker]
    folders: list[Folder]
    bad: list[Bad]

    def within(self, rows: int) -> "Found":
        return replace(self, shards=[shard for shard in self.shards if shard.stop <= rows])


_looks: ContextVar[dict[Hashable, object] | None] = ContextVar("looks", default=None)


@contextmanager
def looked_at_once() -> Iterator[None]:
    """In here a cell's folder is looked at once, whoever asks again: for what only shows many cells, since several of
    them read from the same one."""
    token = _looks.set({})
    try:
        yield
    finally:
        _looks.reset(token)


def _once(key: Hashable, look: Callable[[], T]) -> T:
    looks = _looks.get()
    if looks is None:
        return look()
    if key not in looks:
        looks[key] = look()
    return cast(T, looks[key])


def settled(cell: Cell) -> Cell:
    """A cell that is whole by the rows that its own markers speak of stays so, whatever its parents became."""
    return _settled(cell, _scan(replace(cell, rows=None))) if cell.parents else cell


def extent(cell: Cell, deep: bool = False, schema: Schema | None = None) -> Extent:
    if deep:
        return _extent_of(cell, deep, schema)
    return _once((cell.path, cell.digest, cell.rows), lambda: _extent_of(cell, deep, schema))


def _extent_of(cell: Cell, deep: bool, schema: Schema | None) -> Extent:
    if not cell.parents:
        return _extent(cell, _scan(cell, deep, schema))
    found = _scan(replace(cell, rows=None))
    cell = _settled(cell, found)
    if deep or (cell.rows is not None and found.within(cell.rows) != found):  # more is bad by that number of rows
        found = _scan(cell, deep, schema)
    return _extent(cell, found)


def _scan(cell: Cell, deep: bool = False, schema: Schema | None = None) -> Found:
    def scanned() -> Found:
        shards, bad = scan(cell.path, cell.digest, deep, schema, MOST_ROWS if cell.rows is None else cell.rows)
        folders, worse = scan_folders(cell.path, cell.digest, deep)
        return Found(shards, folders, [*bad, *worse])

    return scanned() if deep else _once(("scan", cell.path, cell.digest, cell.rows), scanned)


def _settled(cell: Cell, found: Found) -> Cell:
    pieces = _extent(replace(cell, rows=None), found).pieces
    known = [replace(cell, rows=rows) for rows in {piece.made.rows for piece, _ in pieces} if rows]
    return next((one for one in known if _extent(one, found.within(one.total)).whole), cell)


def _extent(cell: Cell, found: Found) -> Extent:
    shards, folders = found.shards, found.folders
    left, steps = None if cell.rows is None else gaps(shards, cell.rows), states(cell, folders)
    pieces: list[tuple[Piece, int]] = [(shard, shard.rows) for shard in shards]
    if steps:
        if cell.rows is not None:
            done = steps_done(cell, steps)
            left = [(done, cell.rows)] if done < cell.rows else []
        before = [0, *map(step_of, steps)]
        pieces += [(state, step_of(state) - start) for state, start in zip(steps, before, strict=False)]
    of_steps = {state.path for state in steps}
    others = [folder for folder in folders if folder.path not in of_steps]
    pieces += [(folder, 0) for folder in others]
    missed: list[Piece] = [p for p in [*shards, *others, *steps[-1:]] if p.retired]
    return Extent(pieces, found.bad, left, missed)


def state_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(piece: Folder) -> int:
    named = STATE.fullmatch(piece.name)
    assert named
    return int(named[1])


def states(cell: Cell, folders: list[Folder]) -> list[Folder]:
    """Those that are states of a work in steps, in their order, retired ones too."""
    return [
        f
        for f in folders
        if STATE.fullmatch(f.name) and step_of(f) > 0 and (cell.rows is None or step_of(f) <= cell.rows)
    ]


def steps_done(cell: Cell, steps: list[Folder]) -> int:
    """Up to the last state that is still there; all of them where the last one of the cell was retired."""
    return max((step_of(s) for s in steps if not s.retired or step_of(s) == cell.rows), default=0)
