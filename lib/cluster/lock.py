"""One submission of an experiment at a time: a look at the queue and what is then submitted belong together.

The lock is a folder on scratch that a rename puts in its place: NFS and Lustre do that at once, or not at
all where a folder with something in it stands. Its holder also owns a name in the kernel of its machine, which sbatch
inherits. While one of them lives the name is taken; who gets it afterwards, one process at a time, clears the lock."""

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.base.atomic import beside, disk_errors, read_json, remove, write_json
from lib.base.errors import UserError
from lib.base.process import HOST, own_name, pid_started, user
from lib.base.typed import Mistyped, parse
from lib.store.markers import sweep

NAME, FILE = "submit.lock", "holder.json"
HELD = (errno.ENOTEMPTY, errno.EEXIST)
OLD_SECONDS = 600  # a submission takes seconds
SETTLE_SECONDS = 3  # what an sbatch that was killed had asked for is in the queue by then
TRIES = 50


@dataclass(frozen=True)
class Holder:
    """Who submits."""

    user: str
    host: str
    network: str
    pid: int
    pid_started: str
    since: float
    token: str


@contextmanager
def submitting(folder: Path) -> Iterator[int]:
    """Nobody else submits this experiment meanwhile. Yields a descriptor for the children that count as the holder."""
    token, path = secrets.token_hex(16), folder / NAME
    name = own_name(token)
    if name is None:
        raise UserError("this system refuses a socket name; see `ulimit -n`")
    with name:
        _take(path, token)
        try:
            yield name.fileno()
        finally:
            _clear(path, token)


def _take(path: Path, token: str) -> None:
    me = Holder(user(), HOST, _network(), os.getpid(), pid_started(os.getpid()), time.time(), token)
    new = beside(path)
    sweep(path.parent)
    try:
        write_json(new / FILE, asdict(me))
        holder: Holder | None = None
        for _ in range(TRIES):
            _rename(new, path)
            holder = _holder(path)
            if holder and holder.token == token:  # asked of the folder: a rename's answer can get lost
                return
            if holder:
                _clear_dead(path, holder)
            time.sleep(0.05)
    finally:
        remove(new)
    if holder is None:
        raise UserError(f"{path} names nobody who holds it; if nobody submits this experiment, delete it")
    raise UserError(f"{_who(holder)}; it has ended, but what it started has not: try again in a moment")


def _rename(new: Path, path: Path) -> None:
    with disk_errors(path):
        try:
            new.rename(path)
        except OSError as e:
            if e.errno not in HELD and new.exists():
                raise


def _clear_dead(path: Path, holder: Holder) -> None:
    """Remove the lock of a process of this machine that has ended; a UserError for one that may live."""
    if (holder.host, holder.network) != (HOST, _network()):
        old = time.time() - holder.since > OLD_SECONDS
        fix = f"that is long: if it has ended there, delete {path}" if old else "try again when it is done"
        raise UserError(f"{_who(holder)}; {fix}")
    name = own_name(holder.token)
    if name:
        with name:
            time.sleep(SETTLE_SECONDS)
            _clear(path, holder.token)
    elif pid_started(holder.pid) == holder.pid_started:
        raise UserError(f"{_who(holder)}; try again when it is done")


def _clear(path: Path, token: str) -> None:
    """Remove the lock that carries this token, and no other."""
    holder = _holder(path)
    if holder and holder.token == token:
        gone = beside(path)
        with suppress(OSError):
            path.rename(gone)
        remove(gone)


def _holder(path: Path) -> Holder | None:
    """None where nobody holds it, or what says so is not ours."""
    with suppress(Mistyped):
        return parse(Holder, read_json(path / FILE))
    return None


def _who(holder: Holder) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    where = f"{holder.user} on {holder.host}, process {holder.pid}"
    return f"this experiment is being submitted by {where}, since {since}"


def _network() -> str:
    """Names in the kernel are those of a network namespace: a container of the same host name may have its own."""
    return str(Path("/proc/self/ns/net").readlink())
