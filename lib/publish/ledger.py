"""What was asked of the Hub lately, by all tasks that publish for a user from one scratch: so that together they stay
within what it allows in a day, an hour, five minutes.

    <scratch>/hub/<user>.json      for each kind: when, how many, what for"""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lib.base.atomic import clock_of, disk_errors, read_file, write_json
from lib.base.errors import UserError
from lib.base.turns import one_at_a_time
from lib.base.typed import Mistyped, parse

HUB = "hub"  # the folder, on scratch
NEW, COMMITS, CALLS = "new", "commits", "calls"
DAY, HOUR, FIVE_MINUTES = 86400.0, 3600.0, 300.0


@dataclass(frozen=True)
class Entry:
    kind: str
    time: float
    count: int
    what: str


@dataclass(frozen=True)
class Entries:
    entries: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Ledger:
    path: Path

    def take(self, kind: str, most: int, window: float, count: int = 1, what: str = "") -> float:
        """0.0 where so many more fit into the window: they are noted then. Else the seconds until they will, and
        nothing is noted. `what`: asked again it is the same one, and free."""
        lock = self.path.with_suffix(".lock")
        with one_at_a_time(lock, f"what was asked of the Hub ({self.path.name})"):
            now, all_of_them = self._now(), self._read()
            recent = [replace(one, time=min(one.time, now)) for one in all_of_them if one.time > now - DAY]
            if any(one.time > now for one in all_of_them):  # a clock was ahead: those would count until it is then
                self._write(recent)
            mine = [one for one in recent if one.kind == kind and one.time > now - window]
            if what and any(one.what == what for one in mine):
                return 0.0
            if wait := _until(mine, count - most, now, window):
                return wait
            self._write([*recent, Entry(kind, now, count, what)])
        return 0.0

    def spent(self, kind: str, window: float) -> int:
        since = time.time() - window
        return sum(one.count for one in self._read() if one.kind == kind and one.time > since)

    def _now(self) -> float:
        """By the disk's clock, which all who share the ledger have in common: one of them that is days ahead would
        forget what the others did today."""
        with disk_errors(self.path):
            return clock_of(self.path.parent)

    def _write(self, entries: list[Entry]) -> None:
        write_json(self.path, asdict(Entries([asdict(one) for one in entries])))

    def _read(self) -> list[Entry]:
        try:
            data = read_file(self.path)
        except FileNotFoundError:
            return []
        except OSError as e:  # it may well be whole: nothing is written over it
            raise UserError(
                f"{self.path}, where what is asked of the Hub is noted, cannot be read ({e.strerror}): make it "
                "readable, or delete it"
            ) from None
        try:
            return list(_entries(json.loads(data)))
        except (ValueError, RecursionError):
            print(f"{self.path} is broken: what was asked of the Hub before this counts no more", flush=True)
            return []


def _entries(raw: object) -> Iterator[Entry]:
    """Those that can be read: what is lost of it lets the Hub itself say no."""
    for one in parse(Entries, raw).entries:
        with suppress(Mistyped):
            yield parse(Entry, one)


def _until(entries: list[Entry], excess: int, now: float, window: float) -> float:
    """Seconds until the oldest of these have left the window, as many as there are too many."""
    excess += sum(one.count for one in entries)
    for one in sorted(entries, key=lambda one: one.time):
        if excess <= 0:
            break
        excess -= one.count
        wait = one.time + window - now
        if excess <= 0:
            return max(wait, 0.01)
    return 0.0


def ledger_of(scratch: Path, user: str) -> Ledger:
    return Ledger(scratch / HUB / f"{user}.json")
