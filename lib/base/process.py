"""Who a process is: its host, and a start time that tells a reused number from the one that was meant."""

import socket
from pathlib import Path

HOST = socket.gethostname()


def pid_started(pid: int) -> str:
    """Boot-relative start time of a process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
