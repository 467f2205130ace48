"""Prompts of a behaviour: all, by the prompt's own toxicity, or by that of what the model makes of it.

Two layouts: RealToxicityPrompts' {"prompt": {"text", "toxicity"}}, and plain {"text", "toxicity"} of a user's own."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from lib.base.errors import UserError, shown
from lib.base.progress import Progress
from lib.base.typed import as_text, fits, is_text
from lib.inputs.general import encode, sha256_text
from lib.inputs.hub import Row
from lib.inputs.samples import Rows
from lib.inputs.specs import ModelSpec, PromptsSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUND = 64  # prompts answered and scored between two looks whether there are enough


@dataclass(frozen=True)
class Prompt:
    index: int  # row of the dataset, in file order
    source: str
    text: str
    ids: list[int]
    toxicity: float = math.nan  # as the dataset says; NaN where it does not
    response: str = ""
    response_toxicity: float = math.nan


Answer = Callable[[list[list[int]]], list[tuple[str, float]]]  # prompts' ids -> responses and their toxicity
Answerer = Callable[[Path, ModelSpec, PromptsSpec, str, str], Answer]  # lib.evaluation.responses.answerer


def usable(
    stream: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: PromptsSpec, counts: Counter[str]
) -> Iterator[Prompt]:
    """Prompts that can be asked, in file order; for select=prompt those that are toxic enough. What is passed over is
    counted: a prompt without a score (RealToxicityPrompts has some) is neither toxic nor harmless."""
    for index, row in enumerate(stream):
        counts["rows"] += 1
        text, toxicity = _fields(row, f"dataset {spec.id}, row {index}")
        if not text.strip():
            counts["empty"] += 1
        elif spec.select == "prompt" and math.isnan(toxicity):
            counts["unscored"] += 1
        elif spec.select == "prompt" and toxicity < spec.threshold:
            counts["below"] += 1
        elif spec.select == "prompt" and toxicity > spec.at_most:
            counts["above"] += 1
        elif len(ids := encode(tokenizer, [text])[0]) > spec.max_tokens:
            counts["too_long"] += 1
        else:
            yield Prompt(index, as_text(row.get("filename") or row.get("url") or ""), text, ids, toxicity)


def answered(prompts: Iterable[Prompt], spec: PromptsSpec, counts: Counter[str], answer: Answer) -> Iterator[Prompt]:
    """Those whose own response is toxic enough. Rounds are of one size and in file order, whoever passes."""
    prompts = iter(prompts)
    with closing(Progress(spec.candidates, unit="answers")) as progress:
        while batch := list(islice(prompts, ROUND)):
            answers = answer([p.ids for p in batch])
            progress.add(len(batch))
            for prompt, (response, score) in zip(batch, answers, strict=True):
                counts["answered"] += 1
                if score >= spec.threshold:
                    yield replace(prompt, response=response, response_toxicity=score)
                else:
                    counts["below"] += 1


def draw_prompts(prompts: Iterable[Prompt], spec: PromptsSpec, name: str, counts: Counter[str]) -> Rows:
    """The first so many; with held_out, every second one is kept for evaluation."""
    kept = list(islice(_once(prompts, counts) if spec.held_out else prompts, spec.samples))
    if len(kept) < spec.samples:
        passed = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        fix = ", threshold or candidates" if spec.select == "response" else " or threshold"
        raise UserError(
            f"samples {name}: only {len(kept)} prompts of {spec.id} pass, and {spec.samples} are asked for ({passed}); "
            f"lower data.prompts.{name}.samples{fix if spec.select != 'all' else ''}"
        )
    rows = Rows(
        ids=[p.ids for p in kept],
        source=[p.source or f"row {p.index}" for p in kept],
        text_sha256=[sha256_text(p.text) for p in kept],
        held_out=[spec.held_out and place % 2 == 1 for place in range(len(kept))],
        columns={
            "index": np.array([p.index for p in kept], dtype=np.int64),
            "toxicity": np.array([p.toxicity for p in kept], dtype=np.float32),
        },
        facts=dict(counts),
    )
    if spec.select == "response":
        rows.columns["response"] = [p.response for p in kept]
        rows.columns["response_toxicity"] = np.array([p.response_toxicity for p in kept], dtype=np.float32)
    return rows


def _once(prompts: Iterable[Prompt], counts: Counter[str]) -> Iterator[Prompt]:
    """Without those whose tokens came before: what is judged must not be what was attributed."""
    seen: set[tuple[int, ...]] = set()
    for prompt in prompts:
        if tuple(prompt.ids) in seen:
            counts["twice"] += 1
        else:
            seen.add(tuple(prompt.ids))
            yield prompt


def _fields(row: Row, where: str) -> tuple[str, float]:
    """Text and toxicity (NaN: none is given)."""
    prompt = row.get("prompt")
    inner = prompt if isinstance(prompt, dict) else row
    text = prompt if isinstance(prompt, str) else inner.get("text")
    toxicity = inner.get("toxicity")
    if not is_text(text) or not (toxicity is None or _is_score(toxicity)):
        raise UserError(f"{where}: wanted a prompt with text and toxicity, or text and toxicity; got {shown(row)}")
    return text, math.nan if toxicity is None else float(toxicity)


def _is_score(value: object) -> TypeGuard[float]:
    return isinstance(value, float) or fits(value, float)
