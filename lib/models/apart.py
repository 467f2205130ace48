"""Calls to an object that lives in a process of its own: a fork of this one, which holds all that was loaded.

For work that would keep this process's threads from their own (Python lets one run at a time), and for code that a
model's folder brought along: a chat template may loop for ever or want all memory, and only a process can be ended.
It ends with the one that forked it, and before any CUDA is initialised is the time to fork."""

import ctypes
import gc
import math
import os
import resource
import signal
import socket
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lib.base.errors import UserError, one_line

GIB = 1 << 30
MEMORY = 4 * GIB  # beyond what it begins with
THREAD_MEMORY = 1 << 27  # of addresses, which malloc takes for a thread, one a core
SECONDS = 60.0
ROW_SECONDS = 0.02  # 20 times what rendering and tokenising a row takes
GRACE = 3  # seconds from TERM to the end of a call that is under way
SET_PDEATHSIG = 1  # of linux/prctl.h


class Apart:
    """`make` is called in the new process; `ask` calls the methods of what it returned, for one thread at a time.
    `what` names it in errors."""

    def __init__(self, make: Callable[[], Any], what: str) -> None:
        self.what, self.waiting = what, False
        ours, theirs = socket.socketpair()
        parent, leads = os.getpid(), threading.current_thread() is threading.main_thread()
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            _child(Connection(theirs.detach()), make, parent, leads)
        theirs.close()
        self.connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self.pid, self.connection, parent)

    def ask(self, method: str, *arguments: Any, rows: int = 1) -> Callable[[], Any]:
        """Begin a call; what is returned waits for its result. A UserError of the call is raised here."""
        if self.waiting:  # for an answer that nobody wanted in the end
            with suppress(EOFError, OSError):
                self._receive()
        seconds, self.waiting = math.ceil(SECONDS + ROW_SECONDS * rows), True
        with suppress(OSError):  # it is gone: the answer will say so
            self.connection.send((method, arguments, seconds))
        return lambda: self._answer(seconds)

    def _answer(self, seconds: int) -> Any:
        try:
            kind, result = self._receive()
        except (EOFError, OSError):
            raise UserError(self._why(seconds)) from None
        if kind == "result":
            return result
        raise UserError(result) if kind == "wrong" else RuntimeError(result)

    def _receive(self) -> tuple[str, Any]:
        self.waiting = False
        return self.connection.recv()

    def _why(self, seconds: int) -> str:
        """How the process ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) if self.end.detach() else 0
        if code == -signal.SIGALRM:
            return (
                f"{self.what} takes longer than {seconds} s for what is a moment's work: it does not end, or repeats "
                "itself without measure; mend it, or choose another model"
            )
        return (
            f"{self.what} ended the process that runs it (exit code {code}): it wants more than {MEMORY // GIB} GiB, "
            "or somebody killed that process; mend it or choose another model, or run the same again"
        )


def _child(connection: Connection, make: Callable[[], Any], parent: int, leads: bool) -> None:
    """Serve until the other end is closed. Never returns: nothing of the parent's ends is run."""
    code = 1
    try:
        for signum in (signal.SIGINT, signal.SIGUSR1):  # the parent's affair, which ends this one
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # Slurm sends it to all processes: the parent has to see its own first, not that this one is gone.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
        if leads:  # the kernel would send it as well when a thread that forked ends
            ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)
        _limit_memory()
        gc.enable()  # a task that loads has no use for it, and forks meanwhile: this process lives on
        made = None
        while os.getppid() == parent:
            method, arguments, seconds = connection.recv()
            signal.alarm(seconds)  # its default ends the process, whatever runs
            try:
                made = make() if made is None else made
                answer = "result", getattr(made, method)(*arguments)
            except UserError as e:
                answer = "wrong", str(e)
            except MemoryError as e:
                answer = "wrong", f"no memory is left: {one_line(e)}"
            except Exception:
                answer = "broken", traceback.format_exc()
            signal.alarm(0)
            connection.send(answer)
    except (EOFError, OSError):
        code = 0
    finally:
        os._exit(code)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY + THREAD_MEMORY * len(os.sched_getaffinity(0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _end(pid: int, connection: Connection, parent: int) -> None:
    connection.close()
    if os.getpid() == parent:  # not in another fork of it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
