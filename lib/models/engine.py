"""Engines that draw answers to prompts of token ids: one small interface, by vLLM and by transformers.

A call is a closed batch: the engine is idle, its prefix cache empty, and it gets all prompts before its first step. So
what it computes together depends on the call alone, and a call that is made again, on the same kind of machine, gives
the same answers."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from lib.base.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Nothing but this decides a draw: no top-p, top-k, penalty or default of a model's own."""

    temperature: float  # 0: the likeliest
    max_tokens: int
    ends: tuple[int, ...]  # token ids that end an answer


@dataclass(frozen=True)
class Answer:
    ids: list[int]  # without the end
    ended: bool  # by the model itself; else cut


@dataclass(frozen=True)
class Setting:
    """Of an engine that is to be made."""

    folder: str
    dtype: str
    at_once: int  # rows computed at the same time, at most
    max_length: int  # tokens of prompt and answer, at most
    exact: bool = False  # kernels whose results do not depend on the batch
    parts: int = 1  # engines that share a GPU
    rank: int = 0  # of the adapters that it will be asked with, the largest; 0: none
    merged: bool = False  # adapters go into its weights, one at a time; else they stand beside them
    more: dict[str, Any] = field(default_factory=dict)  # further arguments of vLLM's LLM, for measurements


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter in peft's form. The name is its content's: what has another one is another adapter."""

    name: str
    folder: str


@dataclass(frozen=True)
class Probe:
    """An answer that is given, under an adapter or none: what the engine says of its tokens is asked for."""

    context: tuple[int, ...]
    answer: tuple[int, ...]
    adapter: Adapter | None


@dataclass(frozen=True)
class Made:
    answers: list[Answer]
    seconds: float  # that the engine was at work
    probes: list[tuple[int, list[float]]] = field(default_factory=list)  # number, log-probabilities: of every engine


@dataclass(frozen=True)
class Work:
    """A closed batch. A probe is computed just before the first row of its adapter; one without an adapter, and one
    whose adapter has no row, first of all."""

    prompts: Sequence[Sequence[int]]
    how: Sampling
    seeds: Sequence[int]
    adapters: Sequence[Adapter | None] = ()  # of each row, those of one adapter one after another; none said: none
    probes: Sequence[Probe] = ()


@dataclass(frozen=True)
class Batch:
    """Work that was begun, for these rows."""

    rows: range
    prompt_tokens: int
    wait: Callable[[], Made]

    def facts(self, word: str, made: Made) -> dict[str, float | str]:
        """For the record; `word`: the engine's."""
        return {
            "engine": word,
            "engine_seconds": round(made.seconds, 3),
            "prompt_tokens": self.prompt_tokens,
            "tokens": sum(len(one.ids) for one in made.answers),
            "rows_cut": sum(not one.ended for one in made.answers),
        }


class Engine(Protocol):
    about: dict[str, str]  # what it is, for the record

    def begin(self, work: Work) -> Callable[[], Made]:
        """Of each prompt the answer that its seed draws, after the batches that were begun before it. What is returned
        waits for it."""
        ...


def turns(work: Work) -> Iterator[tuple[Adapter | None, range, list[int]]]:
    """The batch in its order: rows of one adapter, one after another, and the probes that go before them."""
    rows, probes = len(work.prompts), work.probes
    of = list(work.adapters) or [None] * rows
    starts = [i for i in range(rows) if i == 0 or of[i] != of[i - 1]]
    if len({of[i] for i in starts}) != len(starts):
        raise ValueError("rows of one adapter must follow each other")
    present = {of[i] for i in starts} - {None}
    early = [number for number, probe in enumerate(probes) if probe.adapter not in present]
    for number in early:
        yield probes[number].adapter, range(0), [number]
    for start, stop in pairwise([*starts, rows]):
        mine = [] if of[start] is None else [n for n, probe in enumerate(probes) if probe.adapter == of[start]]
        yield of[start], range(start, stop), mine


def seeds_of(seed: int, condition: str, rows: range) -> list[int]:
    """63 bits a row, hashed: seeds that lie side by side share parts of their streams in some generators."""
    texts = (f"{seed}/{condition}/{row}".encode() for row in rows)
    return [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1 for text in texts]


def chosen(word: str, gpu: str) -> str:
    """`auto` is vLLM where it is installed and the site has GPUs."""
    there = find_spec("vllm") is not None
    if word == "vllm" and not there:
        raise UserError(
            "generate.engine is vllm, which is not installed in .venv: run `make setup`, or set "
            "generate.engine=transformers"
        )
    return word if word != "auto" else "vllm" if there and gpu != "cpu" else "transformers"


def ends_of(folder: str, eos: int | None) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, and those of the model, which may have several."""
    found = [] if eos is None else [eos]
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        own = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if own is not None:
            found += own if isinstance(own, list) else [own]
            break
    if not found:
        raise UserError(f"{folder}: neither the model nor its tokenizer says which token ends a text (eos_token_id)")
    return tuple(dict.fromkeys(found))
