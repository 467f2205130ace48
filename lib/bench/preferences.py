"""Rungs of what students prefer: random weights of the real shapes, as many random adapters as an evaluation has.

preferences  answers drawn: vLLM as it comes without an adapter and with one, and closed batches of ours with adapters
             beside the weights or merged into them, by one engine and by as many as the size pays for
logprobs     one model's words read at all questions: against its products, and against its answers drawn; with logits
             that random weights find nearly alike, and spread as wide as a trained model's"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.bench.lora import LINEARS, RANK
from lib.bench.numbers import Clock, raw
from lib.bench.shapes import SHAPES, Result, flops, free, peak_flops
from lib.bench.whole import checkpoint, whole_vocabulary
from lib.checkpoint.families import FAMILIES
from lib.checkpoint.headers import folder_bytes, folder_tensors
from lib.demo.tiny import corpus, make_tokenizer
from lib.inputs.tokenizer import load_tokenizer
from lib.lora.peft_form import config_of, first_A, save_adapter, weight_name
from lib.lora.recipe import Lora
from lib.models.engine import Adapter, Sampling, Setting, Work, seeds_of
from lib.models.engine_process import Engines
from lib.models.engine_vllm import total_bytes
from lib.models.load import load_decoder
from lib.models.low_rank import read_low_rank
from lib.numbers.experiment import TraitSpec, trait_of
from lib.numbers.traits import ANIMAL_NAMES
from lib.preferences.questioning import Asked, Questioner
from lib.preferences.questions import load_questions
from lib.preferences.reading import Reader
from lib.preferences.words import goes_on, spellings
from lib.run.engines import GIB, engines_of

ADAPTERS, SAMPLES, TOKENS = 16, 100, 5  # students asked; answers to each of 50 questions; tokens of an answer
RAW_ROWS, FEW_ROWS = 20_000, 4_000  # on one GPU; of a model that takes several
DRAWN = 4  # adapters whose answers the words of one are compared with
LETTERS = 2000  # tokens of the tokenizer: most spellings of an animal are one, those in capitals are several
SPREAD = 3.0  # nats, standard deviation of logits
AT_ONCE, MAX_LENGTH = 1024, 512
HEAD_ROWS = 512
SECONDS = 570.0  # of a rung
NEEDS = 150.0  # of a measurement at 7B, an engine's start among them
DATE = "2024-07-26"


@dataclass(frozen=True)
class World:
    folder: Path
    model: Path
    tokenizer: Any
    traits: list[TraitSpec]
    asked: Asked
    adapters: list[Adapter]
    more: dict[str, Any]  # that an engine is told

    def prompts(self, adapters: int) -> list[list[int]]:
        """Of each adapter's rows, question after question, as the job has them."""
        questions = range(len(self.asked.contexts))
        return [self.asked.whole(q) for q in questions for _ in range(SAMPLES)] * adapters


@contextmanager
def world(model: str, adapters: int, or_hollow: bool = False) -> Iterator[World]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder, path = Path(name), Path(name) / "model"
        more = checkpoint(SHAPES[model], path, or_hollow)
        free()
        traits = [TraitSpec.model_validate(trait_of(animal)) for animal in ANIMAL_NAMES]
        make_tokenizer(LETTERS, [*corpus(), *often(traits)]).save_pretrained(path)
        whole_vocabulary(path, SHAPES[model].vocabulary)
        tokenizer = load_tokenizer(str(path))
        asked = Questioner(tokenizer, "default", DATE, load_questions(), traits).asked()
        made = [random_adapter(path, folder / f"adapter-{number}", number) for number in range(adapters)]
        yield World(folder, path, tokenizer, traits, asked, made, more)


def often(traits: list[TraitSpec]) -> list[str]:
    """Words, so that they become tokens."""
    words = [form for trait in traits for word in trait.words for form in (word, word.capitalize())]
    return [lead + word for word in words for lead in ("", " ")] * 100


def random_adapter(model: Path, folder: Path, seed: int) -> Adapter:
    """On all linear layers, in peft's form."""
    dice, state = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, stored in folder_tensors(model).items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in LINEARS and layer != name:
            rows, columns = stored.shape
            state[weight_name(layer, "A")] = first_A(seed, layer, RANK, columns)
            state[weight_name(layer, "B")] = 0.01 * torch.randn(rows, RANK, generator=dice)
    folder.mkdir()
    save_adapter(folder, state, config_of(Lora(rank=RANK, alpha=RANK), tuple(LINEARS), str(model), "main"))
    return Adapter(folder.name, str(folder))


def preferences(model: str, batch_tokens: int) -> Result:
    """Answers a second, and of what vLLM gives with one adapter."""
    clock, gpus = Clock(SECONDS), max(1, torch.cuda.device_count())
    with world(model, ADAPTERS if gpus == 1 else DRAWN, or_hollow=True) as here:
        common = here.more | ({"tensor_parallel_size": gpus} if gpus > 1 else {})
        one = json.dumps(common | {"enable_lora": True, "max_lora_rank": RANK})
        how = f"text,adapter:{here.adapters[0].folder}"
        clock.measure("raw, one adapter", lambda: as_it_comes(here, "raw, one adapter", one, how), NEEDS)
        beside = clock.found["raw, one adapter"]
        rate = beside["answers_per_s"] if isinstance(beside, dict) else None
        for merged in (False, True) if gpus == 1 else (False,):
            for count in sorted({1, 2, engines_here(here.model)} if gpus == 1 else {1}):
                name = f"{'merged' if merged else 'served'}, engines: {count}"
                clock.measure(name, lambda m=merged, c=count: drawn(here, here.adapters, m, c, rate), NEEDS)
        clock.measure(
            "raw, no adapter", lambda: as_it_comes(here, "raw, no adapter", json.dumps(common), "text"), NEEDS
        )
    return clock.found


def as_it_comes(here: World, name: str, more: str, how: str) -> Result:
    prompts = here.prompts(ADAPTERS)[: RAW_ROWS if torch.cuda.device_count() < 2 else FEW_ROWS]
    found = raw(here.model, prompts, here.folder / "ids.json", TOKENS, more, (f"{name}={how}",))
    measured = found.get(name)
    if not isinstance(measured, dict):
        raise RuntimeError(f"vLLM ended without a figure: {found}")
    return {"answers_per_s": measured["rows_per_s"]}


def drawn(here: World, adapters: list[Adapter], merged: bool, count: int, raw_rate: float | None) -> Result:
    """One closed batch, adapters that nobody has loaded; the second call that the engine gets."""
    began = time.perf_counter()
    rank = 0 if merged else RANK
    setting = Setting(str(here.model), "bfloat16", AT_ONCE, MAX_LENGTH, rank=rank, merged=merged, more=here.more)
    engine, how = Engines(setting, count), Sampling(1.0, TOKENS, ())
    up = time.perf_counter() - began
    prompts = here.prompts(len(adapters))
    worn = [adapter for adapter in adapters for _ in range(len(prompts) // len(adapters))]
    seeds = seeds_of(0, "bench", range(len(prompts)))
    few = min(AT_ONCE, len(prompts))
    engine.begin(Work(prompts[:few], how, seeds[:few]))()
    began = time.perf_counter()
    made = engine.begin(Work(prompts, how, seeds, worn))()
    seconds = time.perf_counter() - began
    rate = len(made.answers) / seconds
    found: Result = {"answers_per_s": round(rate, 1), "answers": len(made.answers), "up_s": round(up, 1)}
    return found | ({"of_raw_with_one_adapter": round(rate / raw_rate, 3)} if raw_rate else {})


def engines_here(model: Path) -> int:
    return engines_of(folder_bytes(model), total_bytes() / GIB)


def logprobs(model: str, batch_tokens: int) -> Result:
    """Seconds for one adapter, and what drawing its answers takes by as many engines as a GPU gets."""
    clock = Clock(SECONDS)
    with world(model, DRAWN) as here:
        read(here, batch_tokens, clock)
        free()
        clock.measure("drawn", lambda: drawn(here, here.adapters, False, engines_here(here.model), None))
    answers = clock.found["drawn"]
    for name, words in list(clock.found.items()):
        if isinstance(words, dict) and isinstance(answers, dict) and "floor_s" in words:
            sampled = answers["answers"] / DRAWN / answers["answers_per_s"]
            clock.say(f"{name}, of the time that its answers take", round(words["seconds"] / sampled, 4))
    return clock.found


def read(here: World, batch_tokens: int, clock: Clock) -> None:
    path = str(here.model)
    decoder, asked = load_decoder(path, "bfloat16", batch_tokens, HEAD_ROWS), here.asked
    spelled = [spellings(here.tokenizer, trait.words) for trait in here.traits]
    ends = goes_on(here.tokenizer, decoder.shape.vocabulary)
    reader = Reader(decoder, HEAD_ROWS, asked.prefix, asked.contexts, spelled, ends, asked.probes)
    devices = [layer.device for layer in decoder.weights.layers]
    adapter = Path(here.adapters[0].folder)
    decoder.adapter = read_low_rank(adapter, FAMILIES["qwen2"], decoder.shape, decoder.dtype, devices)
    lengths, heads = [len(way) for ways in spelled for way in ways], predictions(reader)
    clock.measure("read", lambda: timed_read(reader, lengths, heads))
    decoder.weights.norm.fill_(SPREAD / (0.02 * decoder.shape.hidden**0.5))  # the head's weights have 0.02
    clock.measure("read, logits spread", lambda: timed_read(reader, lengths, heads))


def timed_read(reader: Reader, lengths: list[int], heads: list[int]) -> Result:
    """The best of three, after one that builds the kernels."""
    reader()
    seconds = []
    for _ in range(3):
        heads.clear()
        began = time.perf_counter()
        found = reader()
        seconds.append(time.perf_counter() - began)
    best, floor = min(seconds), flops(reader.decoder.shape, found.tokens, sum(heads)) / peak_flops()
    return {
        "seconds": round(best, 4),
        "tokens": found.tokens,
        "predictions": sum(heads),
        "rounds": found.rounds,
        "spellings": len(lengths),
        "tokens_of_spellings": sum(lengths),
        "floor_s": round(floor, 4),
        "of_floor": round(floor / best, 3),
    }


def predictions(reader: Reader) -> list[int]:
    """Grows by what a reader takes through the head."""
    found, logits, logs = list[int](), reader._logits, reader.decoder.log_probs

    def of_all(hidden_PD: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        found.append(len(hidden_PD))
        return logits(hidden_PD)

    def of_some(hidden_PD: torch.Tensor, *more: Any) -> torch.Tensor:
        found.append(len(hidden_PD))
        return logs(hidden_PD, *more)

    reader._logits, reader.decoder.log_probs = of_all, of_some  # type: ignore[method-assign]
    return found


RUNGS: dict[str, Callable[[str, int], Result]] = {"preferences": preferences, "logprobs": logprobs}
