"""Folders of a cell: an adapter, a state of a training, a page. One is committed by a marker with a manifest.

    <cell>/step-00000100-1f3a5c7e9b/           the files; the last part of the name is from the manifest's sha256
    <cell>/step-00000100.json                  the marker: as a shard's, and path, size and sha256 of each file

As with shards, the name depends on the content alone: two copies at once make the same folder, and should they differ,
the marker points at one that is whole."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from lib.base.atomic import read_file, remove, sha256_file, sync_folder, temporary
from lib.base.typed import parse
from lib.store.markers import Bad, Facts, Piece, Vouched, about, look_at, place, remove_old, understood

NAME = re.compile(r"(?!merged\b)[a-z][a-z0-9]*(-[a-z0-9]+)*")
MARKER_NAME = re.compile(NAME.pattern + r"\.json")


@dataclass(frozen=True)
class File:
    path: str  # from the folder, with /
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class VouchedFolder(Vouched):
    name: str
    folder: str
    files: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Folder(Piece):
    name: str
    files: tuple[File, ...]

    @property
    def folder(self) -> Path:
        return self.data


def commit_folder(
    cell_path: Path,
    digest: str,
    name: str,
    fill: Callable[[Path], None],
    *,
    seconds: float = 0.0,
    made: Mapping[str, Any] | None = None,
    facts: Facts | None = None,
    sampled: bool = False,
) -> Folder:
    """Let `fill` write files into an empty folder, and commit it. `sampled`: as for shards, the first one stays."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a folder piece: lower case words, joined by -, not merged")
    marker = {"digest": digest, "name": name, **about(seconds, made, facts)}
    with temporary(cell_path / name) as tmp:
        tmp.mkdir()
        fill(tmp)
        files = [_file(tmp, path) for path in sorted(_walk(tmp))]
        sha = manifest_sha256(files)
        target = cell_path / f"{name}-{sha[:10]}"
        _move(tmp, target, files)
    marker |= {"folder": target.name, "sha256": sha, "bytes": sum(f.bytes for f in files)}
    marker["files"] = [asdict(f) for f in files]
    path = cell_path / f"{name}.json"
    first = place(path, marker, sampled, partial(_check, digest=digest, deep=True))
    if first and (first.adopted or first.retired):
        remove(target)
    return first or _piece(path, *understood(path, marker, VouchedFolder))


def scan_folders(cell_path: Path, digest: str, deep: bool = False) -> tuple[list[Folder], list[Bad]]:
    """The folders that hold, by name, and the markers that do not with the reason. `deep` reads every byte."""
    return look_at(cell_path, MARKER_NAME, partial(_check, digest=digest, deep=deep), deep)


def sweep_folders(cell_path: Path) -> None:
    """Remove folders that a kill left without a marker, once no writer can be about to make it."""
    names = re.compile(rf"({NAME.pattern})-[0-9a-f]{{10}}")
    marked = {path.stem for path in cell_path.glob("*.json")}
    orphans = [path for path in cell_path.glob("*/") if (m := names.fullmatch(path.name)) and m[1] not in marked]
    remove_old(cell_path, orphans)


def manifest_sha256(files: list[File]) -> str:
    plain = [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in files]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _walk(folder: Path) -> dict[str, int]:
    """Sizes of all files below; a ValueError for what is neither a file nor a folder (a link could point anywhere)."""
    found: dict[str, int] = {}
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                name = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                elif not entry.is_file(follow_symlinks=False):
                    raise ValueError(f"{name} is neither a file nor a folder")
                else:
                    found[name] = entry.stat(follow_symlinks=False).st_size
    return found


def _file(folder: Path, name: str) -> File:
    """Make a file durable, and read it back."""
    name.encode()  # a name that is no text cannot stand in a marker
    with (folder / name).open("rb") as f:
        os.fsync(f.fileno())
        size = os.fstat(f.fileno()).st_size
    return File(name, size, sha256_file(folder / name))


def _move(tmp: Path, target: Path, files: list[File]) -> None:
    """Give a folder its place; what is there already stays if it is the same, and goes if it is broken."""
    for folder in {(tmp / f.path).parent for f in files} | {tmp}:
        sync_folder(folder)
    while True:
        try:
            tmp.rename(target)
        except OSError:
            if not target.exists():
                raise
            if not why_wrong(target, files, deep=True):
                return
            with temporary(target) as old, suppress(FileNotFoundError):
                target.rename(old)
        else:
            return


def why_wrong(folder: Path, files: list[File] | tuple[File, ...], deep: bool) -> str:
    """'' for a folder that holds these files and no others."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return f"{folder.name} is not a folder"
        found = _walk(folder)
        if odd := sorted(set(found) ^ {f.path for f in files}):
            return f"{folder.name} {'has one file too many' if odd[0] in found else 'lacks'}: {odd[0]}"
        for f in files:
            if found[f.path] != f.bytes:
                return f"{folder.name}: {f.path} has {found[f.path]} bytes, the marker says {f.bytes}"
            if deep and sha256_file(folder / f.path) != f.sha256:
                return f"{folder.name}: {f.path} has another sha256 than the marker says"
    except ValueError as e:
        return f"{folder.name}: {e}"
    except OSError as e:
        return f"{folder.name}: {e.strerror}"
    return ""


def _check(path: Path, digest: str, deep: bool) -> Folder | str:
    """A marker that holds, or why it does not."""
    try:
        said, common = understood(path, json.loads(read_file(path)), VouchedFolder)
        piece = _piece(path, said, common)
    except (OSError, ValueError, RecursionError):
        return "the marker cannot be read"
    if said.digest != digest:
        return f"digest {said.digest[:8]} is another experiment's (wanted {digest[:8]})"
    if path.stem != said.name or said.folder != f"{said.name}-{said.sha256[:10]}":
        return "it points outside its cell, or to another piece's folder"
    names = [f.path for f in piece.files]
    if names != sorted(set(names)) or not all(map(_stays_inside, names)):
        return "its manifest names a file twice, or one outside its folder"
    if said.sha256 != manifest_sha256(list(piece.files)) or said.bytes != sum(f.bytes for f in piece.files):
        return "its manifest is another than its sha256 says"
    return piece if piece.retired else why_wrong(piece.data, piece.files, deep) or piece


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name


def _piece(path: Path, said: VouchedFolder, common: dict[str, Any]) -> Folder:
    files = tuple(parse(File, one, exact=True) for one in said.files)
    return Folder(data=path.parent / said.folder, name=said.name, files=files, **common)
