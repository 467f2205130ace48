"""Markers: what vouches for a piece (a shard or a folder), who made it, and what its kernel has to say.

A marker is written after its piece. Computed pieces are the same whoever makes them, so a later marker may replace an
earlier one. Sampled ones need not be: their marker is made exclusively, and the first one wins."""

import ctypes
import errno
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lib.base.atomic import (
    TEMPORARY,
    clock_of,
    disk_errors,
    json_bytes,
    read_json,
    remove,
    temporary,
    write_bytes,
    write_json,
)
from lib.base.errors import FULL, UserError
from lib.base.process import has_ended
from lib.base.typed import LARGEST, Mistyped, fits, parse

Facts = Mapping[str, int | float | str]
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
DAY_SECONDS = 86400
HERE, NEW_ONLY = -100, 1  # AT_FDCWD, RENAME_NOREPLACE


@dataclass(frozen=True)
class Made:
    """How a piece came about, as far as anything relies on it."""

    attempt: str = ""
    host: str = ""
    job: str = ""
    restart: int = 0
    gpus: int = 0
    device: str = ""
    code: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    rows: int = 0  # of the whole cell, for one that reads from others
    parents: dict[str, str] = field(default_factory=dict)  # what it read from -> sha256 of what that held


@dataclass(frozen=True)
class Retired:
    """Why the bytes of a piece were removed on purpose, and what had read them."""

    why: str
    read_by: str


@dataclass(frozen=True, kw_only=True)
class Vouched:
    """What every marker says."""

    digest: str
    sha256: str
    bytes: int
    seconds: float
    made: dict[str, Any]
    facts: dict[str, Any]
    retired: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Piece:
    path: Path  # of the marker
    data: Path  # the file, or the folder
    sha256: str
    bytes: int
    seconds: float  # the kernel's time
    made: Made
    facts: Facts
    retired: Retired | None = None
    adopted: bool = False  # another copy's: it was first, with other bits


class Bad(NamedTuple):
    """A marker that does not hold."""

    path: Path
    reason: str
    seen: tuple[int, ...]  # what was judged: another copy may have put a good one in its place since


V = TypeVar("V", bound=Vouched)
P = TypeVar("P", bound=Piece)


def about(seconds: float, made: Mapping[str, Any] | None, facts: Facts | None) -> dict[str, Any]:
    """A marker's part that is not about bytes; a ValueError for what no reader would take."""
    parse(Made, dict(made or {}))
    for key, value in (facts or {}).items():
        if not is_fact(value):
            raise ValueError(f"fact {key} is {value!r}: facts are finite numbers of Python's, or text")
    return {"seconds": seconds, "made": dict(made or {}), "facts": dict(facts or {})}


def is_fact(value: object) -> bool:
    if type(value) in (int, float):
        return math.isfinite(value) and abs(value) <= LARGEST  # type: ignore[arg-type]
    return fits(value, str)


def understood(path: Path, raw: object, kind: type[V]) -> tuple[V, dict[str, Any]]:
    """What a marker says, and what of it all pieces have; a ValueError where it is none."""
    said = parse(kind, raw)
    if not all(map(is_fact, said.facts.values())):
        raise Mistyped("facts")
    common = {"path": path, "sha256": said.sha256, "bytes": said.bytes, "seconds": said.seconds, "facts": said.facts}
    retired = parse(Retired, said.retired) if said.retired else None
    return said, {**common, "made": parse(Made, said.made), "retired": retired}


def counted(pieces: Iterable[Piece], key: str) -> float:
    """The sum of a fact; nothing where it is not one of theirs, or a text."""
    values = (piece.facts.get(key, 0) for piece in pieces)
    return sum(value for value in values if not isinstance(value, str))


def seen(path: Path) -> tuple[int, ...]:
    """What tells a marker from one that took its place."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def place(path: Path, marker: dict[str, Any], sampled: bool, look: Callable[[Path], P | str]) -> P | None:
    """Write a marker, or get the piece of the copy which was first. `look`: a marker's piece, or why it is none."""
    if not sampled:
        write_json(path, marker)
    while sampled and not _first(path, json_bytes(marker)):
        judged, found = seen(path), look(path)
        if not isinstance(found, str):
            if found.sha256 == marker["sha256"]:
                return found
            print(f"{path.stem}: another copy was first with other bits; its are kept, these are dropped", flush=True)
            return replace(found, adopted=True)
        set_aside([Bad(path, found, judged)])
    return None


def _first(path: Path, data: bytes) -> bool:
    """Make a file that is not there yet, whole; False where it is."""
    with temporary(path) as tmp:
        write_bytes(tmp, data)
        try:
            os.link(tmp, path)
        except FileExistsError:
            return tmp.stat().st_nlink == 2  # ours: the answer of a network file system was lost
        except OSError as e:
            if e.errno not in NO_LINKS:
                raise
            return _rename_if_new(tmp, path)
    return True


def _rename_if_new(tmp: Path, path: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(HERE, os.fsencode(tmp), HERE, os.fsencode(path), NEW_ONLY) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        return False
    raise UserError(
        f"cannot write {path} so that the first one wins: this file system has neither hard links nor exclusive "
        "renames; point SUITE_SCRATCH at one that has"
    )


def look_at(
    folder: Path, name: re.Pattern[str], check: Callable[[Path], P | str], deep: bool
) -> tuple[list[P], list[Bad]]:
    """The pieces of the markers with such names, and the markers that do not hold."""
    try:
        paths = [folder / one for one in sorted(filter(name.fullmatch, os.listdir(folder)))]  # noqa: PTH208
    except FileNotFoundError:
        return [], []
    except OSError as e:
        raise UserError(f"cannot list {folder}: {e.strerror}; check that scratch is mounted and readable") from None

    def one(path: Path) -> P | Bad:
        judged, found = seen(path), check(path)
        return Bad(path, found, judged) if isinstance(found, str) else found

    if deep or len(paths) > 64:  # a network file system answers each stat in a millisecond: ask for many at once
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(one, paths))
    else:
        results = list(map(one, paths))
    return [r for r in results if not isinstance(r, Bad)], [r for r in results if isinstance(r, Bad)]


def set_aside(bad: list[Bad]) -> None:
    """Take markers that do not hold out of the way; nothing is deleted, and nothing that was not judged is moved."""
    for path, _, judged in bad:
        with suppress(FileNotFoundError), disk_errors(path):  # another copy of the task was quicker
            if seen(path) == judged:
                aside = path.with_name(path.name + ".bad")
                path.rename(aside)
                if seen(aside) != judged:
                    with suppress(OSError):
                        os.link(aside, path)


def retire(piece: Piece, why: str, read_by: str) -> bool:
    """Remove a piece's bytes on purpose. Its marker stays, counts as done and says why; it is written first, so that
    a kill in between leaves bytes that `drop_retired` removes. False: the marker is another piece's by now."""
    raw = read_json(piece.path)
    if raw is None or raw.get("sha256") != piece.sha256:
        return False
    parse(Retired, gone := {"why": why, "read_by": read_by})
    _say_more(piece.path, {**raw, "retired": gone})
    with disk_errors(piece.data):
        remove(piece.data)
    return True


def _say_more(marker: Path, said: Mapping[str, object]) -> None:
    """Where the disk is full, in the marker's own block, and by one write: what is to be said there makes room."""
    try:
        write_json(marker, said)
    except UserError as e:
        full = isinstance(e.__context__, OSError) and e.__context__.errno in FULL
        if not full or marker.stat().st_blocks * 512 < len(data := json_bytes(said)):
            raise
        with disk_errors(marker), marker.open("r+b", buffering=0) as f:
            f.write(data)
            os.fsync(f.fileno())


def drop_retired(pieces: list[P]) -> None:
    for piece in pieces:
        if piece.retired:
            remove(piece.data)


def needed(piece: Piece) -> None:
    """A UserError where the bytes of a piece are wanted and gone on purpose."""
    if piece.retired:
        raise UserError(
            f"{piece.data} was retired ({piece.retired.why}; read by {piece.retired.read_by}): "
            f"to have it again, delete {piece.path.name} beside it and run `make resume`"
        )


def sweep(folder: Path) -> None:
    """Remove temporary files and folders whose writer is gone: a process of this machine that has ended, or one that
    cannot be seen from here and wrote nothing for a day. What a day is says the file system, whose clock set both
    times: that of a machine may be days ahead."""
    unseen = []
    for path in folder.glob(f"{TEMPORARY}*"):
        ended = has_ended(path.name.removeprefix(TEMPORARY))
        if ended:
            remove(path)
        elif ended is None:
            unseen.append(path)
    remove_old(folder, unseen)


def remove_old(folder: Path, paths: list[Path]) -> None:
    """Those of a folder that were not written to for a day."""
    if not paths:
        return
    with suppress(OSError):
        now = clock_of(folder)
        for path in paths:
            with suppress(OSError):
                if now - path.lstat().st_mtime > DAY_SECONDS:
                    remove(path)
