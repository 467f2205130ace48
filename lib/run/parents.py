"""What a cell reads from: cells of an earlier stage, by their markers. So a chain can be submitted before its first
stage has run, and a child that starts looks whether it can."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from lib.base.errors import UserError
from lib.run.extent import extent
from lib.run.heartbeat import Beat, heartbeats
from lib.store import Cell, Piece
from lib.store.markers import Bad, seen

P = TypeVar("P", bound=Piece)
Beats = Callable[[Path], Mapping[str, list[Beat]]]


def why_blocked(cell: Cell, beats: Beats = heartbeats) -> str:
    """Why a cell cannot run yet; '' where all that it reads from is done. `beats`: heartbeats that several cells
    share."""
    return "; ".join(why for parent in cell.parents if (why := _why_not_done(parent, beats)))


def _why_not_done(parent: Cell, beats: Beats) -> str:
    found = extent(parent)
    if found.whole:
        return ""
    last = next(reversed(beats(parent.folder).get(parent.name, [])), None)
    ended = f"; it {last.state}: {last.error}" if last and last.state in ("failed", "blocked") else ""
    how_far = f"{found.done} of {'?' if parent.rows is None else parent.rows}"
    return f"{parent.spoken}, which it reads from, is not done ({how_far}{ended})"


def why_without_rows(cell: Cell) -> str:
    """Of a cell whose parents are done, why how many rows it has is still not known; '' where it is."""
    if cell.rows is not None:
        return ""
    parents = ", ".join(parent.spoken for parent in cell.parents)
    return f"{parents}, which it reads from, holds no row for it, or cannot be read: `make verify` there says which"


def contents(cell: Cell) -> str:
    """sha256 over a cell's pieces: another one when they were made again with other bits, or cut otherwise."""
    pieces = sorted((piece.path.name, piece.sha256) for piece, _ in extent(cell).pieces)
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def read_from(cell: Cell) -> dict[str, str]:
    """What a cell's markers say of its parents: the contents that it reads."""
    return {parent.spoken: contents(parent) for parent in cell.parents}


def made_again(cell: Cell, pieces: Iterable[Piece]) -> list[str]:
    """The parents with other contents than some piece of the cell was made from; one of which nothing is here (results
    may come from another machine, without what they were made from) is no other copy."""
    now = {parent.spoken: contents(parent) for parent in cell.parents if extent(parent).pieces}
    return sorted({name for piece in pieces for name in _others(piece, now)})


def _others(piece: Piece, now: Mapping[str, str]) -> list[str]:
    return [name for name, sha in now.items() if piece.made.parents.get(name, sha) != sha]


def must_be_of_these(cell: Cell) -> None:
    """For who reads a cell beside what that was made from."""
    if again := made_again(cell, [piece for piece, _ in extent(cell).pieces]):
        raise UserError(
            f"{cell.spoken} was made from another copy of {', '.join(again)}: remove {cell.path}, submit it again, and "
            "then this"
        )


def without_older_parents(cell: Cell, pieces: list[P]) -> tuple[list[P], list[Bad]]:
    """Of a cell that goes on, the pieces made from what its parents hold now, and the others: the two must not meet in
    one result."""
    now = read_from(cell)
    older = {piece.path: names for piece in pieces if (names := _others(piece, now))}
    bad = [
        Bad(path, f"it was made from another copy of {', '.join(names)}", seen(path)) for path, names in older.items()
    ]
    return [piece for piece in pieces if piece.path not in older], bad
