"""Wrong inputs by the thousand, the same for a seed: what is changed, how a case is run, and when it offends.

A case may end in right numbers (it compares them itself, with what it knows otherwise), or as every command does: exit
code 2 and one line of printable text. Anything else offends: another exception, a hang, a file where none belongs."""

import contextlib
import faulthandler
import io
import json
import os
import random
import signal
import socket
import string
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools import ROOT

from lib.base.errors import USER, exit_with

CASES = int(os.environ.get("SUITE_FUZZ_CASES", "700"))
SEED = int(os.environ.get("SUITE_FUZZ_SEED", "1"))
SECONDS = 20  # of a case: the slowest takes two on an idle machine
NOBODY = 65534

Case = Callable[[random.Random], object]


class Hang(BaseException):
    """A case that does not end."""


def fuzz(share: float, case: Case) -> None:
    """So large a share of all cases; those that offend are named, one a place, with the seed that runs it alone."""
    offending: dict[str, list[str]] = {}
    count, right = max(1, round(CASES * share)), 0
    for seed in range(SEED, SEED + count):
        place, said = run(case, random.Random(seed))
        right += not place
        if said:
            offending.setdefault(place, []).append(f"SUITE_FUZZ_CASES=1 SUITE_FUZZ_SEED={seed}: {said}")
    many = sum(map(len, offending.values()))
    print(f"{count} cases from seed {SEED}: {right} with right results, {count - right - many} refused, {many} offend")
    assert right or count < 20, "every case was refused: nothing was tried but the refusal"
    lines = [f"{len(of)} x {place}: {of[0]}" for place, of in offending.items()]
    assert not offending, "\n".join([f"{many} of {count} cases from seed {SEED} offend", *lines])


def run(case: Case, rng: random.Random) -> tuple[str, str]:
    """Nothing for right results, `refused` for a sentence; of what offends where, and what it did."""
    out, err = io.StringIO(), io.StringIO()
    done: list[object] = []
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limit():
            exit_with(lambda: done.append(case(rng)))
    except SystemExit as e:
        if e.code == 0:
            return "", ""
        last = err.getvalue().splitlines()[-1:] or [""]
        good = e.code == USER and "error: " in last[0] and last[0].isprintable() and len(last[0]) < 2000
        lines = sum("error: " in line for line in err.getvalue().splitlines())
        return ("refused", "") if good and lines == 1 else (f"exit {e.code}", repr(err.getvalue()[-300:]))
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith(str(ROOT))]
        ours = [f for f in frames if ".venv" not in f.filename][-1]
        text = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        return (
            f"{type(e).__name__} at {Path(ours.filename).name}:{ours.lineno}",
            f"{text} ({getattr(rng, 'note', '')!s:.300})",
        )
    return "exit_with", "has returned"


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(
        6 * SECONDS, exit=True, file=sys.__stderr__
    )  # where no line of Python's is reached any more
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root can read and write whatever its mode says; a user who is not root sees what is refused."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


TEXTS = [
    "", " ", "x", "\0", "a\0b", "a\nb", "\r", "\x1b[31m", "\x7f", "\ud800", "\U0001f600", "\u202eabc", "\u2028",
    "e\u0301", "..", "../../x", "/etc/passwd", "/", "//", ".", "~", "~nosuch/x", "./x", "cache:", "cache:../../x",
    "cache:\0", "x.jsonl", "/dev/null", "/proc/self/mem", "-rf", "--help", "$(id)", "`id`", "a;b", "'", '"', "\\",
    "%s%n", "{}", "{trait}", "{trait:>99999999999}", "{trait.__class__}", "{0}", "{", "}", "{{", "[/INST]", "null",
    "true", "1e999", "nan", "0x10", "1_000", "2026-13-01", "main", "a/b", "a/b/c", "x" * 300, "y" * 70_000,
    "\u00e9" * 200, "NaN",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 7, 255, 1023, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30),
    0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e15, 1e16, 1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip


def odd(rng: random.Random) -> Any:
    """A value that may stand where another is wanted."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 6:
        return rng.choice(NUMBERS)
    return rng.choice(
        [None, True, False, [], {}, [[]], [None], {"": None}, {"x": {"y": [1]}}, ["a", 1, None], [0] * 50]
    )


def near(rng: random.Random, value: Any) -> Any:
    """A value of the same type, and another."""
    if isinstance(value, bool) or value is None:
        return odd(rng)
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 2, value // 2, value * 1000, float(value), str(value)])
    if isinstance(value, float):
        return rng.choice([value * 2, -value, value + 1e-9, 0.0, round(value, 1), str(value), value * 1e300])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice(
            [value + rng.choice(TEXTS), value[:at], value[:at] + rng.choice(TEXTS) + value[at:], value.upper(), [value]]
        )
    if isinstance(value, list):
        return rng.choice([value[1:], value[:-1], value + value[:1], value[::-1], [*value, odd(rng)], {"0": value}])
    return rng.choice([list(value), {**value, "more": 1}, {**value, rng.choice(TEXTS): odd(rng)}])


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, the whole first."""
    found = [at]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        found += places(part, (*at, key))
    return found


def changed(rng: random.Random, value: Any, most: int = 200) -> Any:
    """A JSON value with one to three changes anywhere in it."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.choice(places(value)[:most])
        if not at:
            if rng.random() < 0.2:
                return odd(rng)
            continue
        here = value
        for key in at[:-1]:
            here = here[key]
        last, how = at[-1], rng.randrange(6)
        if how < 3:
            here[last] = odd(rng)
        elif how == 3:
            here[last] = near(rng, here[last])
        elif how == 4:
            del here[last]
        elif isinstance(here, dict):
            here[rng.choice([*here, *TEXTS])] = here[last]
        else:
            here.insert(rng.randrange(len(here) + 1), odd(rng))
    return value


def json_bytes(rng: random.Random, value: Any, indent: int | None = 1) -> bytes:
    """A changed JSON value as a file; now and then what no writer of JSON makes."""
    how = rng.randrange(12)
    if how > 1:
        text = json.dumps(changed(rng, value), indent=indent, ensure_ascii=rng.random() < 0.7)
        if how == 2:
            text = text.replace("Infinity", "1e999")
        data = text.encode("utf-8", "surrogatepass")
        return mutated(rng, data) if how in (3, 4) else data
    text = json.dumps(value, indent=indent)
    inside = text.find(":") + 1
    deep = rng.choice([50, 990, 3000, 100_000])
    return rng.choice([
        text[:inside] + "[" * deep + "]" * deep + "," + text[inside:],
        '{"a":' * deep + text + "}" * deep,
        text[:inside] + "9" * 5000 + text[inside:],
        text.replace("{", '{"digest": 5, "rows": 1, ', 1) + " ",
        text.replace("{", "{" + text[1:inside] + "null,", 1),
        text + text,
        "\ufeff" + text,
        "[" * deep,
    ]).encode(rng.choice(["utf-8", "utf-8", "utf-16"]))  # fmt: skip


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes that were cut, flipped, moved, doubled or zeroed."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        size = len(data)
        a, b = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
        b = min(b, a + rng.choice([1, 4, 64, 4096]))
        data = rng.choice([
            lambda a=a, b=b, d=data: d[:a],
            lambda a=a, b=b, d=data: d[:a] + d[b:],
            lambda a=a, b=b, d=data: d[:a] + bytes(x ^ (1 << rng.randrange(8)) for x in d[a:b]) + d[b:],
            lambda a=a, b=b, d=data: d[:a] + bytes(b - a) + d[b:],
            lambda a=a, b=b, d=data: d[:b] + d[a:b] + d[b:],
            lambda a=a, b=b, d=data: d[:a] + rng.randbytes(rng.choice([1, 3, 200])) + d[a:],
            lambda a=a, b=b, d=data: d + d[a:b],
            lambda a=a, b=b, d=data: d[:a] + rng.choice(TEXTS).encode("utf-8", "replace")[:400] + d[a:],
        ])()  # fmt: skip
    return data


def misplaced(rng: random.Random, path: Path) -> str:
    """Something in place of a file or a folder that is none; what it is."""
    was = path.read_bytes() if path.is_file() else b""
    how = rng.choice(
        ["gone", "folder", "dangling", "loop", "pipe", "empty", "unreadable", "socket", "full", "long", "file"]
    )
    if how == "unreadable":
        path.touch()
        path.chmod(0)
        return how
    _away(path)
    if how == "folder":
        path.mkdir()
    elif how == "full":
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "x").write_text("x")
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "empty":
        path.touch()
    elif how == "file":
        path.write_text("{}")
    elif how == "long":
        path.write_bytes(was * 3 + b"\n")
    elif how == "socket" and len(str(path)) < 100:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
            one.bind(str(path))
    return how


def _away(path: Path) -> None:
    from lib.base.atomic import remove

    remove(path)


def word(rng: random.Random, most: int = 40) -> str:
    """Any text at all."""
    if rng.random() < 0.5:
        return rng.choice(TEXTS)
    letters = rng.choice(
        [string.printable, string.ascii_letters, "0123456789-:,%|._[] \x1e\x1f\n", "\0\x1b\u202e\ud800\u00e9"]
    )
    return "".join(rng.choice(letters) for _ in range(rng.randrange(most)))
