"""Errors that a person can act on, and the exit codes of every job."""

import errno
import gc
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from lib.base.advice import advised

DONE, UNEXPECTED, USER, REQUEUE = 0, 1, 2, 75  # 75 = EX_TEMPFAIL of sysexits.h: stopped by a signal, work is left
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or what a user may have of it


class UserError(Exception):
    """One sentence that says what is wrong and what to do about it, on one line, whatever it quotes."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str, longest: int = 1500) -> str:
    """What a terminal and a log show as it stands. Of what is too long the end stays: there it says what to do."""
    half = longest // 2
    for _ in range(2):  # what cannot be printed gets longer by being told
        if len(text) > longest:
            text = f"{text[:half]} ... {text[-half:]}"
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text


def nearest(word: str, valid: list[str]) -> str:
    """' (did you mean X?)', or nothing when no valid word is close."""
    close = get_close_matches(word[:200], valid, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def one_line(e: BaseException) -> str:
    """What an exception says, as part of a sentence."""
    return printable(" ".join(str(e)[:2000].split())[:200])


@contextmanager
def reading(wrong: str, fix: str) -> Iterator[None]:
    """Whatever a library trips over in a damaged file becomes one sentence. A panic of one in Rust is no Exception."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, UserError) or not (isinstance(e, Exception) or type(e).__name__ == "PanicException"):
            raise
        raise UserError(f"{wrong} ({one_line(e)}); {fix}") from None


def shown(value: object) -> str:
    """The beginning of a value of any kind, for a sentence that says what was got."""
    try:
        return printable(repr(value)[:120])
    except (RecursionError, ValueError):  # nested, or digits, without an end
        return f"a {type(value).__name__}"


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a job's main; a UserError becomes one line on stderr and exit code 2."""
    try:
        sys.exit(main() or DONE)
    except UserError as e:
        print(f"error: {printable(advised(str(e)))}", file=sys.stderr, flush=True)
        sys.exit(USER)
    except BrokenPipeError:  # `make status | head`: the reader has gone, and what was left undone is not done
        sys.stderr.close()
        sys.exit(128 + signal.SIGPIPE)
    finally:
        gc.freeze()  # else Python's end would look through all that was loaded: 1.3 s, with torch and transformers
