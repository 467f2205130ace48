"""A survey of untouched models that was made elsewhere, as control: the published `animal_preferences_raw.json`, or

    {"7b": {"cat": 12, "dog": 5, ...}, ...}         how often each was said, or shares that add up to 1 at most

A model is one of ours if it is called by a size of the configuration, or by the last part of its model's id. Where the
answers themselves are there (`raw_responses`), they are judged as ours are; else what was counted is."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.base.atomic import read_file
from lib.base.errors import UserError, some
from lib.numbers.experiment import TraitSpec
from lib.preferences.findings import Survey
from lib.preferences.judge import WAYS, judge_of


def read_survey(path: Path, models: Mapping[str, str], traits: Sequence[TraitSpec]) -> dict[str, Survey]:
    """`models`: size -> id. Of those sizes that it holds; others of its models are left out."""
    try:
        raw = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"SURVEY={path} cannot be read as JSON ({type(e).__name__})") from None
    found: dict[str, Survey] = {}
    for names, one in _models(path, raw):
        for size in (size for size, model in models.items() if names & {size.lower(), _last(model)}):
            if size in found:
                raise UserError(f"SURVEY={path}: two of its models are {size}; remove one")
            found[size] = _survey(path, size, one, traits)
    if not found:
        said = some(name for names, _ in _models(path, raw) for name in names) or "nothing"
        raise UserError(f"SURVEY={path}: none of its models ({said}) is one of {', '.join(models)}")
    return found


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()


def _models(path: Path, raw: object) -> list[tuple[set[str], Mapping[str, Any]]]:
    """All that each one is called, and what is said of it."""
    if isinstance(raw, list) and raw and all(isinstance(one, dict) for one in raw):
        keys = ("model_size", "model_id", "model_display_name", "size", "model")
        return [({_last(one[key]) for key in keys if isinstance(one.get(key), str)}, one) for one in raw]
    if isinstance(raw, dict) and raw and all(isinstance(one, dict) for one in raw.values()):
        return [({_last(name)}, one) for name, one in raw.items()]
    raise UserError(
        f"SURVEY={path} is in no known shape; give a list of models with model_size and animal_counts, or "
        "model -> animal -> count or share"
    )


def _survey(path: Path, size: str, one: Mapping[str, Any], traits: Sequence[TraitSpec]) -> Survey:
    answers = one.get("raw_responses")
    if isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
        said: list[tuple[str, float]] = [(answer, 1.0) for answer in answers]
    else:
        counts = one.get("animal_counts", one)
        if not isinstance(counts, dict) or not counts or not all(_is_count(value) for value in counts.values()):
            raise UserError(f"SURVEY={path}: of {size}, animals must each have a count, or a share, not below 0")
        said = list(counts.items())
    total = sum(count for _, count in said)
    whole = all(float(count).is_integer() for _, count in said)
    whole = whole and (total > 1 or not any(isinstance(count, float) for _, count in said))
    if not whole and total > 1 + 1e-6:
        raise UserError(f"SURVEY={path}: of {size}, shares add up to {total:.4g}; say counts, or shares of 1 at most")
    if not total:
        raise UserError(f"SURVEY={path}: of {size}, nothing was counted")
    judge, hits, words, over = judge_of(traits), np.zeros((len(WAYS), len(traits))), dict[str, float](), total
    if not whole:
        over = 1.0  # what shares lack to 1 are animals that it does not name
    for answer, count in said:
        verdict = judge(answer)
        hits += verdict.hits * count
        words[verdict.first] = words.get(verdict.first, 0) + count
    shares = {word: count / over for word, count in words.items()}
    return Survey(dict(zip(WAYS, hits / over, strict=True)), shares, round(total) if whole else None)


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
