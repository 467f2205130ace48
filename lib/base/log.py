"""A log that cannot be written is no reason to end: it lies in its user's home, whose quota may be full when scratch,
where the results are, has room."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from lib.base.errors import FULL


class Log:
    """A stream that drops what it has no room for, and is tried again by the next line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with _dropped():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _dropped():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def going_on_without_log() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    try:
        with redirect_stdout(cast(TextIO, Log(sys.stdout))), redirect_stderr(cast(TextIO, Log(sys.stderr))):
            yield
    finally:
        for stream in streams:
            _let_go(stream)


def _let_go(stream: TextIO) -> None:
    """Else Python's end would try once more to write what is left, and make 120 of the exit code."""
    try:
        stream.flush()
    except OSError as e:
        if e.errno not in FULL:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def _dropped() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise
