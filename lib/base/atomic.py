"""Files that are whole or absent: written beside the target, fsynced, checked, renamed."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from io import BufferedReader
from pathlib import Path
from typing import Any

from lib.base.errors import FULL, UserError
from lib.base.process import signature

TEMPORARY = ".tmp-"
ROOTS = ("SUITE_OUTPUT", "SUITE_CACHE", "SUITE_SCRATCH")  # one may lie in another


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a file system refuses into one sentence."""
    try:
        yield
    except OSError as e:
        if e.errno in FULL:
            fix = _room(path)
        elif e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = f"make it writable or point {_root(path)} at a folder that is"
        elif e.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
            fix = "remove what lies there"
        elif e.errno in (errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG):
            fix = "check this file system"
        else:
            raise
        raise UserError(f"cannot write {e.filename or path}: {os.strerror(e.errno or 0)}; {fix}") from None


def _room(path: Path) -> str:
    return (
        f"free space there or point {_root(path)} elsewhere; what is finished is kept: the same command, or for a job "
        "`make resume` goes on"
    )


def _root(path: Path) -> str:
    """By which variable a path came about; of a process that read no site that of most."""
    at = {name: Path(os.environ[name]).absolute() for name in ROOTS if os.environ.get(name)}
    return next((name for name, root in at.items() if path.absolute().is_relative_to(root)), "SUITE_SCRATCH")


def check_room(path: Path, size: int) -> None:
    """Notice before hours of writing that a file cannot fit. A quota shows only later."""
    disk = shutil.disk_usage(path.parent)
    if disk.total and disk.free < size:
        room = f"it takes {size / 1e9:.3g} GB and {disk.free / 1e9:.3g} GB are free"
        raise UserError(f"cannot write {path}: {os.strerror(errno.ENOSPC)} ({room}); {_room(path)}")


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder, sorted; nothing where there is none. A UserError for one that cannot be looked into."""
    try:
        return sorted(path for path in folder.iterdir() if fnmatchcase(path.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"cannot list {folder}: {e.strerror}; check that scratch is mounted and readable") from None


def beside(path: Path) -> Path:
    """A name beside `path`, unique to the attempt, that tells who made it (see `sweep` of the store)."""
    return path.with_name(f"{TEMPORARY}{signature()}-{secrets.token_hex(4)}-{path.name}")


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name beside `path`, unique to the attempt; what is still there at the end is removed."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = beside(path)
        try:
            yield tmp
        finally:
            remove(tmp)
        sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` once it is filled, for all whom the umask lets read it: some
    libraries write for their user alone."""
    with temporary(path) as tmp:
        tmp.mkdir()
        mode = tmp.stat().st_mode & 0o666
        yield tmp
        for file in tmp.iterdir():
            file.chmod(mode)
            with file.open("rb") as f:
                os.fsync(f.fileno())
        sync_folder(tmp)
        with temporary(path) as old:
            with suppress(FileNotFoundError):
                path.rename(old)
            try:
                tmp.rename(path)
            except OSError:
                if not path.is_dir():  # else another call was quicker with the same
                    raise


def own_folder(path: Path) -> Path:
    """A folder for what is executed or taken on trust: made with mode 700 whatever the umask, and refused when it is
    somebody else's or others can write to it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UserError(f"{path} is not a folder of yours that nobody else can write to; remove it and try again")
    return path


def remove(path: Path) -> None:
    """A file or a folder with all that is in it, as far as that can be done."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def keep_others(digest: str, before: object, *paths: Path) -> None:
    """Results that were written under another digest are not overwritten: they get its first letters as a suffix. What
    says their digest comes last, so that a kill in between leaves nothing to be taken for ours."""
    if before is None or before == digest:
        return
    for path in paths:
        kept = path.with_name(f"{path.name}.{str(before)[:8]}")
        with disk_errors(path):
            if path.exists():
                print(f"{path} was written from other settings: kept as {kept.name}", file=sys.stderr)
                path.rename(kept)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace path by data, atomically and durably."""
    with temporary(path) as tmp:
        with tmp.open("xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if tmp.stat().st_size != len(data) or sha256_file(tmp) != hashlib.sha256(data).hexdigest():
            raise OSError(errno.EIO, "what was read back differs from what was written", str(path))
        tmp.replace(path)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    write_bytes(path, json_bytes(value))


def json_bytes(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def open_file(path: Path) -> BufferedReader:
    """A file to read, and nothing else that may lie in its place: one waits for ever at a pipe's other end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a file", str(path))
    return os.fdopen(fd, "rb")


def read_file(path: Path) -> bytes:
    with open_file(path) as f:
        return f.read()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when it is absent, unreadable or not an object."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(read_file(path))
        return value if isinstance(value, dict) else None
    return None


def clock_of(folder: Path) -> float:
    """What time it is by the clock that dates a folder's files: that of a machine may be days ahead."""
    clock = beside(folder / "clock")
    clock.touch(exist_ok=False)
    try:
        return clock.stat().st_mtime
    finally:
        clock.unlink()


def sha256_file(path: Path) -> str:
    with open_file(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Some network file systems refuse fsync on a folder: harmless there."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
