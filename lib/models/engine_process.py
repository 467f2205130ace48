"""An engine in a process of its own, or several on one GPU, which a small model does not fill from one Python thread.

The device's memory goes back when that process ends, which vLLM does not promise in one that lives on, and this one's
interpreter is free for the host's work beside."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import chain, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lib.base.errors import UserError
from lib.base.log import going_on_without_log
from lib.models.engine import Answer, Made, Setting, Work

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 3  # seconds from TERM to the end: the parent is to see its own first
SET_PDEATHSIG = 1  # of linux/prctl.h


class EngineProcess:
    """vLLM, which begins to start; `up` waits until it has."""

    def __init__(self, setting: Setting) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "lib.models.engine_process", str(theirs.fileno())]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, pass_fds=[theirs.fileno()])
        theirs.close()
        self.connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self.process, self.connection)
        self.sender = ThreadPoolExecutor(1)  # a pipe takes little, and who begins a batch is not to wait
        self.sender.submit(self._send, setting)
        self.begun = 0

    def up(self) -> dict[str, str]:
        """What it is."""
        return self._answer_to(0)

    def begin(self, work: Work) -> Callable[[], Made]:
        prompts = work.prompts
        lengths = np.fromiter(map(len, prompts), np.int32, len(prompts))
        flat = np.fromiter(chain.from_iterable(prompts), np.int32, int(lengths.sum()))
        self.begun = number = self.begun + 1
        self.sender.submit(self._send, (number, flat, lengths, replace(work, prompts=())))

        def wait() -> Made:
            flat, lengths, ended, seconds, said = self._answer_to(number)
            ids = _cut(flat, lengths)
            made = [Answer(one, bool(end)) for one, end in zip(ids, ended.tolist(), strict=True)]
            return Made(made, seconds, said)

        return wait

    def _send(self, what: Any) -> None:
        with suppress(OSError):  # it is gone: the answer will say so
            self.connection.send(what)

    def _answer_to(self, number: int) -> Any:
        """What was begun before it and is not wanted any more comes first, whatever became of it."""
        while True:
            try:
                kind, answered, found = self.connection.recv()
            except (EOFError, OSError):
                code = self.process.wait()
                raise UserError(
                    f"the engine's process ended ({_spoken(code)}), for want of memory perhaps; finished batches are "
                    "kept: see the log above, and run `make resume`"
                ) from None
            if answered == number and kind == "wrong":
                raise UserError(found)
            if answered == number:
                return found


class Engines:
    """Several on the same GPUs, each with its part of the memory and, of every batch, the same part of the rows."""

    def __init__(self, setting: Setting, count: int) -> None:
        began, self.setting = time.monotonic(), replace(setting, parts=count)
        self.engines = [EngineProcess(self.setting) for _ in range(count)]
        abouts = [one.up() for one in self.engines]
        self.about = abouts[0] | {"engines": str(count)}
        many, room = f", {count} of them" if count > 1 else "", int(self.about["kv_tokens"])
        seconds = time.monotonic() - began
        print(f"engine: {self.about['engine']}{many}, room for {room:,} tokens, up in {seconds:.1f} s", flush=True)

    def begin(self, work: Work) -> Callable[[], Made]:
        """An engine gets the probes of the adapters that it gets rows of, and those without one. One that ended in a
        batch before, which is told there, is started again: the cells after that one are to go on."""
        for number, one in enumerate(self.engines):
            if one.process.poll() is not None:
                print(f"engine {number} has ended, and is started again", flush=True)
                self.engines[number] = EngineProcess(self.setting)
                self.engines[number].up()
        probes, cuts = work.probes, [len(work.prompts) * i // len(self.engines) for i in range(len(self.engines) + 1)]
        waiting = []
        for one, (a, b) in zip(self.engines, pairwise(cuts), strict=True):
            if a < b:
                worn = work.adapters[a:b]
                own = [n for n, p in enumerate(probes) if p.adapter is None or p.adapter in set(worn)]
                part = Work(work.prompts[a:b], work.how, work.seeds[a:b], worn, [probes[n] for n in own])
                waiting.append((one.begin(part), own))

        def wait() -> Made:
            found = [(wait(), own) for wait, own in waiting]
            said = [(own[n], logs) for one, own in found for n, logs in one.probes]
            answers = [answer for one, _ in found for answer in one.answers]
            return Made(answers, max(one.seconds for one, _ in found), said)

        return wait


def _cut(flat: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    ids, ends = flat.tolist(), np.cumsum(lengths).tolist()
    return [ids[a:b] for a, b in pairwise([0, *ends])]


def _spoken(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def serve(connection: Connection) -> None:
    from lib.models.engine_vllm import VllmEngine

    engine: VllmEngine | None = None
    number = 0
    while not (engine and engine.broken):
        try:
            asked = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if engine is None:
                engine = VllmEngine(asked)
                found: Any = engine.about
            else:
                number, flat, lengths, rest = asked
                began = time.monotonic()
                made, said = engine.generate(replace(rest, prompts=_cut(flat, lengths)))
                sizes = np.array([len(one.ids) for one in made], np.int32)
                ids = np.fromiter(chain.from_iterable(one.ids for one in made), np.int32, int(sizes.sum()))
                ended = np.array([one.ended for one in made], np.int8)
                found = ids, sizes, ended, time.monotonic() - began, said
            answer = "result", number, found
        except UserError as e:
            answer = "wrong", number, str(e)
        connection.send(answer)


def main() -> None:
    for signum in (signal.SIGINT, signal.SIGUSR1):  # the parent's affair, which ends this one
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)
    with going_on_without_log():  # vLLM says much at its start
        serve(Connection(int(sys.argv[1])))
    os._exit(0)  # what an engine tears down at its end takes seconds, and may fail


if __name__ == "__main__":
    main()
