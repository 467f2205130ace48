"""Processes that begin with what their imports take seconds for: of libraries, none of which asks the environment when
it is imported. huggingface_hub, datasets and transformers do, and are imported by each process itself, as our code is.

A process that is started once forks for each call, and what is forked does what `python ARGUMENTS` would."""

import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
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


def run(*arguments: str, env: dict[str, str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """python ARGUMENTS in an environment, from the repository's root: `-m MODULE` or `-c CODE`, and its words."""
    connection = _started(os.getpid())
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        fds = [out.fileno(), err.fileno()]
        connection.send((arguments, env, [f"/proc/{os.getpid()}/fd/{fd}" for fd in fds]))
        pid = connection.recv()
        if not connection.poll(timeout):
            os.kill(pid, signal.SIGKILL)
        code = connection.recv()
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(["python", *arguments], code, out.read(), err.read())


@cache
def _started(owner: int) -> Connection:
    """Of this process: a fork of it has its own. It ends when nobody holds the other end."""
    ours, theirs = socket.socketpair()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.Popen([sys.executable, str(HERE), str(theirs.fileno())], env=env, pass_fds=[theirs.fileno()])
    theirs.close()
    return Connection(ours.detach())


def serve(connection: Connection) -> None:
    with suppress(EOFError, OSError):
        while True:
            asked = connection.recv()
            pid = os.fork()
            if not pid:
                connection.close()
                end_with(partial(_become, *asked))
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


def _become(arguments: tuple[str, ...], env: dict[str, str], files: list[str]) -> None:
    for fd, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY), fd)
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
    for library in LIBRARIES:
        __import__(library)
    gc.freeze()  # else each child would copy what it looks through
    end_with(lambda: serve(Connection(int(sys.argv[1]))))
