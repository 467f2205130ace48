"""Who a process is: its host, and a start time that tells a reused number from the one that was meant."""

import hashlib
import os
import re
import socket
from functools import cache
from getpass import getuser
from pathlib import Path

HOST = socket.gethostname()


def pid_started(pid: int) -> str:
    """Boot-relative start time of a process; empty where there is none, or only what stays of one until its parent asks
    after it: in a container without an init, for ever."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in ("Z", "X") else rest[18]
    except (OSError, IndexError, ValueError):
        return ""


def signature() -> str:
    """This process in a file's name: its host, what its number is counted in, its number and its start."""
    return f"{HOST}-{_numbering()}-{os.getpid()}-{pid_started(os.getpid())}"


def has_ended(name: str) -> bool | None:
    """Whether the process is gone whose signature a name begins with; None where that cannot be seen from here."""
    found = re.match(rf"{re.escape(HOST)}-{_numbering()}-(\d+)-(\d*)-", name)
    return pid_started(int(found[1])) != found[2] if found else None


@cache
def _numbering() -> str:
    """What a process's number is counted in: a namespace of a running kernel. Containers share names of hosts, and each
    has a process 1."""
    kernel, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return hashlib.sha256(f"{kernel.read_text()}{namespace.readlink()}".encode()).hexdigest()[:8]


def own_name(name: str) -> socket.socket | None:
    """A name that the kernel gives to one process of this machine, and those that inherit it, and takes back when they
    have ended; None where somebody has it."""
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(f"\0hpc-job-suite-{name}")
    except OSError:
        held.close()
        return None
    return held


def user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
