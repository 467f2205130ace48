"""One process at a time, of any machine and any user that shares a file system.

    <lock>/<token>.json      who holds it; touched while the holder lives

A lock is a folder with its holder's file in it. It is taken by renaming such a folder to the lock's name, which works
where nothing or an empty folder stands, and nowhere else; it is given back, by whomever, by removing that one file. So
nobody can take, or clear away, another lock than the one that was looked at."""

import errno
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.base.atomic import beside, clock_of, disk_errors, read_json, remove, write_json
from lib.base.process import HOST, has_ended, signature, user
from lib.base.typed import Mistyped, parse

TOUCH_SECONDS, SILENT_SECONDS = 20, 600  # a holder whose process cannot be seen from here is gone after so long
LOOK_SECONDS = 1
HELD = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)


@dataclass(frozen=True)
class Holder:
    user: str
    host: str
    process: str  # its signature


@contextmanager
def one_at_a_time(lock: Path, what: str, wait: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Nobody else is in here for this lock. Who comes second waits, and says for whom."""
    mine = lock / f"{secrets.token_hex(8)}.json"
    said = ""
    while not _taken(lock, mine):
        held = _holder(lock)
        if held and held[1] != said:
            said = held[1]
            print(f"{what}: {said} is at it; waiting for that to end (else delete {lock})", flush=True)
        wait(LOOK_SECONDS)
    done = threading.Event()
    alive = threading.Thread(target=_touch, args=(mine, done), daemon=True)
    alive.start()
    try:
        yield
    finally:
        done.set()
        alive.join()
        mine.unlink(missing_ok=True)
        with suppress(OSError):
            lock.rmdir()


def _taken(lock: Path, mine: Path) -> bool:
    new = beside(lock)
    with disk_errors(lock):
        try:
            write_json(new / mine.name, asdict(Holder(user(), HOST, signature())))
            new.rename(lock)
        except OSError as e:
            if e.errno not in HELD:
                raise
        finally:
            remove(new)
    return mine.exists()  # asked of the folder: a rename's answer can get lost


def _holder(lock: Path) -> tuple[Path, str] | None:
    """Its file, and who it is; nothing where it has gone, or is cleared away here because it will not come back."""
    with suppress(OSError):
        for path in lock.iterdir():
            try:
                holder = parse(Holder, read_json(path))
                ended = has_ended(f"{holder.process}-")
            except Mistyped:
                holder, ended = Holder("somebody", "some machine", ""), None
            if ended or (ended is None and _silent(path)):
                path.unlink(missing_ok=True)
            else:
                return path, f"{holder.user} on {holder.host}"
    return None


def _silent(path: Path) -> bool:
    """Whether a holder's file was not touched for long."""
    return clock_of(path.parent.parent) - path.stat().st_mtime > SILENT_SECONDS


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(TOUCH_SECONDS):
        with suppress(OSError):
            os.utime(path)
