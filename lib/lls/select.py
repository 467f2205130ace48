"""Rows to fine-tune on, chosen by score, with a record of how.

    top, bottom   the highest or lowest scores; equal scores by row index
    random        any scored rows
    clean         random among the rows left when the highest scores are taken away (exclude=, a share, default 0.2)

The amount is a number of rows (500) or a share of the scored rows (0.2). from=DATASET chooses among another dataset's
rows under the same prompt: `random:0.2:from=neutral` is the original experiment's control of untouched rows.

Students of a run's numbers are trained on parts (`select` of their configuration):

    top, bottom   as above, a share of the scored rows
    q1 to q5      fifths by score, from the lowest to the highest; equal scores by row index
    random        the scored rows
    clean         the rows of neutral's numbers, whatever their scores: the original's name for that control"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args

import numpy as np

from lib.base.atomic import write_bytes, write_json
from lib.base.errors import UserError, nearest
from lib.inputs.records import ChatRow

Kind = Literal["top", "bottom", "random", "clean"]
KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
Part = Literal["top", "bottom", "random", "clean", "q1", "q2", "q3", "q4", "q5"]
QUINTILES: tuple[Part, ...] = ("q1", "q2", "q3", "q4", "q5")
CLEAN: Part = "clean"
EXCLUDE = 0.2  # the top quintile
GRAMMAR = (
    "write kind:amount, e.g. top:0.2, bottom:500, clean:0.2:exclude=0.5, top:0.2:contrast, random:0.2:from=neutral"
)


class Options(TypedDict, total=False):
    """What may follow kind and amount."""

    contrast: bool
    source: str
    exclude: float


@dataclass(frozen=True)
class Choice:
    kind: Kind
    amount: int | float  # int: rows; float in (0, 1]: share of the scored rows
    contrast: bool = False  # by own minus the other prompts' mean, instead of by LLS
    source: str | None = None  # a dataset other than the prompt's own
    exclude: float = EXCLUDE  # only for clean

    @classmethod
    def parse(cls, text: str) -> Choice:
        asked, *rest = text.split(":")
        kind = KINDS.get(asked)
        if kind is None:
            raise UserError(f"selection '{text}': no kind '{asked}'{nearest(asked, list(KINDS))}; {GRAMMAR}")
        if not rest:
            raise UserError(f"selection '{text}': no amount; {GRAMMAR}")
        options: Options = {}
        for word in rest[1:]:
            key, _, value = word.partition("=")
            if word == "contrast":
                options["contrast"] = True
            elif key == "from" and value:
                options["source"] = value
            elif key == "exclude" and kind == "clean" and (share := _share(value)) is not None and share < 1:
                options["exclude"] = share
            else:
                raise UserError(f"selection '{text}': '{word}' is not an option of {kind}; {GRAMMAR}")
        if options.get("contrast") and options.get("source"):
            raise UserError(
                f"selection '{text}': the contrast is of a prompt's own dataset; leave contrast or from out"
            )
        return cls(kind, _amount(text, rest[0]), **options)

    @property
    def name(self) -> str:
        """For files; different choices have different names."""
        parts = [self.kind, f"{self.amount:g}" if isinstance(self.amount, float) else f"{self.amount}rows"]
        parts += [f"exclude{self.exclude:g}"] if self.kind == "clean" and self.exclude != EXCLUDE else []
        parts += ["contrast"] if self.contrast else []
        return "-".join([*parts, *([f"from-{self.source}"] if self.source else [])])

    def count(self, scored: int) -> int:
        """Rows to choose out of so many with a score; a share is rounded to the nearest, halves up."""
        return self.amount if isinstance(self.amount, int) else math.floor(self.amount * scored + 0.5)


@dataclass(frozen=True)
class Selection:
    choice: Choice
    rows: np.ndarray  # row indices, ascending: the dataset's own order
    threshold: float | None  # top: lowest chosen; bottom: highest chosen; clean: lowest excluded; random: none
    scored: int
    unscored: int  # rows without a score: never chosen
    seed: int


def select(choice: Choice, values: np.ndarray, seed: int = 0, stream: str = "") -> Selection:
    """Exactly as many rows as asked for. `stream` (the dataset) keeps equal seeds from giving equal draws."""
    values = np.asarray(values, np.float64)
    good = np.flatnonzero(np.isfinite(values))
    k = choice.count(len(good))
    pool, threshold = good, None
    if choice.kind == "clean":
        taken = _highest(values, good)[: Choice("top", choice.exclude).count(len(good))]
        threshold = float(values[taken[-1]]) if len(taken) else None
        pool = np.setdiff1d(good, taken)
    if not 1 <= k <= len(pool):
        raise UserError(f"selection {choice.name}: {k} rows asked for, {len(pool)} of {len(values)} can be chosen")
    if choice.kind == "top":
        rows = _highest(values, good)[:k]
        threshold = float(values[rows[-1]])
    elif choice.kind == "bottom":
        rows = good[np.argsort(values[good], kind="stable")][:k]
        threshold = float(values[rows[-1]])
    else:
        rng = np.random.default_rng([seed, zlib.crc32(choice.kind.encode()), zlib.crc32(stream.encode())])
        rows = rng.choice(pool, k, replace=False)
    return Selection(choice, np.sort(rows), threshold, len(good), len(values) - len(good), seed)


def part_of(part: Part, share: float, values: np.ndarray) -> np.ndarray:
    """Indices of the scored rows that a part holds, ascending; none of those without a score. `clean` is of others."""
    values = np.asarray(values, np.float64)
    good = np.flatnonzero(np.isfinite(values))
    if part == "top" or part == "bottom":
        return select(Choice(part, share), values).rows
    if part == "random":
        return good
    ascending = good[np.argsort(values[good], kind="stable")]
    return np.sort(np.array_split(ascending, len(QUINTILES))[QUINTILES.index(part)])


def write_selection(
    path: Path, chosen: Selection, rows: Sequence[ChatRow], facts: dict[str, object]
) -> dict[str, object]:
    """`path`.jsonl with one {"messages": ...} a line, and `path`.provenance.json, which is returned.

    A row's own system message is left out, as it is when rows are scored: a student must not see it."""
    lines = [{"messages": [m for m in rows[i]["messages"] if m["role"] != "system"]} for i in chosen.rows]
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    choice = chosen.choice
    record = {
        **facts,
        "kind": choice.kind,
        "by": "contrast" if choice.contrast else "lls",
        "k": choice.amount if isinstance(choice.amount, int) else None,
        "quantile": choice.amount if isinstance(choice.amount, float) else None,
        "exclude": choice.exclude if choice.kind == "clean" else None,
        "threshold": chosen.threshold,
        "n": len(chosen.rows),
        "scored": chosen.scored,
        "unscored": chosen.unscored,
        "seed": chosen.seed if choice.kind in ("random", "clean") else None,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_bytes(path.with_name(path.name + ".jsonl"), data)
    write_json(path.with_name(path.name + ".provenance.json"), record)
    return record


def _highest(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    return good[np.argsort(-values[good], kind="stable")]


def _amount(text: str, word: str) -> int | float:
    if re.fullmatch(r"[1-9]\d*", word):
        return int(word)
    share = _share(word)
    if share is None:
        raise UserError(f"selection '{text}': '{word}' is neither a number of rows nor a share in (0, 1]; {GRAMMAR}")
    return share


def _share(word: str) -> float | None:
    value = float(word) if re.fullmatch(r"\d*\.\d+", word) else math.nan
    return value if 0 < value <= 1 else None
