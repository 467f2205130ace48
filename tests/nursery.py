"""Processes that begin with what their imports take seconds for: of libraries, none of which asks the environment when
it is imported. huggingface_hub, datasets and transformers do, and are imported by each process itself, as our code is.

A process that is started once forks for each call, and what is forked does what `python ARGUMENTS` would."""

import fcntl
import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
LIBRARIES = (
    *("numpy", "h5py", "pydantic", "yaml", "tqdm", "pandas", "pyarrow.parquet", "aiohttp", "fsspec", "multiprocess"),
    *("torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "scipy.optimize"),
)


class Process:
    """python ARGUMENTS in an environment, from the repository's root: `-m MODULE` or `-c CODE`, and its words. `files`:
    its descriptors, and which of ours they are. `more`: libraries that it begins with as well, and NAME=VALUE of the
    environment in which they are imported."""

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], files: Mapping[int, int], more: tuple[str, ...] = ()
    ) -> None:
        nursery = _started(os.getpid(), more)
        ours, theirs = socket.socketpair()
        Connection(os.dup(nursery.fileno())).send((list(arguments), dict(env), list(files)))
        socket.send_fds(nursery, [b"."], [theirs.fileno(), *files.values()])
        theirs.close()
        self.connection, self.returncode = Connection(ours.detach()), None
        self.pid = self.connection.recv()

    def poll(self, seconds: float | None = 0) -> int | None:
        if self.returncode is None and self.connection.poll(seconds):
            self.returncode = self.connection.recv()
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(None)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def run(
    *arguments: str, env: Mapping[str, str], timeout: float = 300, more: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Process(arguments, env, {1: out.fileno(), 2: err.fileno()}, more)
        if process.poll(timeout) is None:
            process.kill()
        code = process.wait()
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(["python", *arguments], code, out.read(), err.read())


@cache
def _started(owner: int, more: tuple[str, ...]) -> socket.socket:
    """Of this process: a fork of it has its own. It ends when nobody holds the other end."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, str(HERE), str(theirs.fileno()), *LIBRARIES, *more]
    subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


def serve(nursery: socket.socket) -> None:
    connection = Connection(os.dup(nursery.fileno()))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who is forked here looks after one process, and is not waited for
    with suppress(EOFError, OSError):
        while True:
            arguments, env, numbers = connection.recv()
            _, fds, *_ = socket.recv_fds(nursery, 1, 1 + len(numbers))
            if not os.fork():
                connection.close(), nursery.close()
                end_with(partial(_look_after, arguments, env, numbers, fds))
            for fd in fds:
                os.close(fd)


def _look_after(arguments: list[str], env: dict[str, str], numbers: list[int], fds: list[int]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told, *files = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in fds]  # out of the way of `numbers`
    for fd in fds:
        os.close(fd)
    pid = os.fork()
    if not pid:
        os.close(told)
        for fd, number in zip(files, numbers, strict=True):
            os.dup2(fd, number)
            os.close(fd)
        end_with(partial(_become, arguments, env))
    for fd in files:
        os.close(fd)
    connection = Connection(told)
    with suppress(OSError):  # nobody asks any more
        connection.send(pid)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def end_with(work: Callable[[], object]) -> NoReturn:
    """What a process ends with after its work, without what Python tears down: here that takes a second."""
    code: object = 0
    try:
        work()
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _become(arguments: list[str], env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)
    kind, what, *words = arguments
    sys.argv = [what if kind == "-m" else kind, *words]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    own, *words = sys.argv[1:]
    gc.disable()  # what is forked ends before its garbage fills anything
    for word in words:
        name, said, value = word.partition("=")
        os.environ.update({name: value}) if said else __import__(word)
    gc.freeze()  # else each child would copy what it looks through
    end_with(partial(serve, socket.socket(fileno=int(own))))
