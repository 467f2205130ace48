"""Rungs of a sweep at Llama shapes: perplexity against its own products, completions against the same engine's plain
ones, and neurons zeroed in weights that transformers' model and the decoder share."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from lib.bench.llamas import config_of
from lib.bench.pruning import random_weights
from lib.bench.shapes import Result, timed
from lib.checkpoint.families import FAMILIES, gated_shape
from lib.evaluation.completions import Completing, complete
from lib.evaluation.log_probs import by_decoder, by_model
from lib.evaluation.perplexity import plan
from lib.models.decoder import Decoder
from lib.models.rope import rope_table
from lib.models.scorer import Scorer
from lib.models.shared import model_of
from lib.pruning.neurons import Pruner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEVICE = "cuda"
HEAD_ROWS, WINDOW, WINDOWS = 1024, 2048, 64
PROMPTS, SAMPLES, PROMPT_TOKENS, NEW, BATCH, NEURONS = 20, 25, 24, 50, 250, 1000


class Words:
    """As much of a tokenizer as completing takes."""

    eos_token_id, pad_token_id = 2, 2

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def decoder_of(model: str, batch_tokens: int) -> Decoder:
    config, device, dtype = config_of(model), torch.device(DEVICE), torch.bfloat16
    shape = gated_shape(config)
    tables = [torch.empty(shape.vocabulary, shape.hidden, device=device, dtype=dtype).normal_(0, 0.02) for _ in "eh"]
    weights = replace(random_weights(model, device, dtype), embedding=tables[0], head=tables[1])
    return Decoder(shape, weights, rope_table(FAMILIES["llama"], config, dtype, 1 << 15), batch_tokens)


@torch.inference_mode()
def products(decoder: Decoder, batch_tokens: int) -> float:
    """Seconds a token of the layers' merged products and of the head's, every position predicted."""
    space, few = decoder._space(decoder.devices[0], batch_tokens), decoder.weights.layers[:4]
    space.x.normal_()
    space.inner.normal_()

    def layers() -> None:
        for w in few:
            space.x @ w.qkv.t()
            space.attended.flatten(1) @ w.o.t()
            space.x @ w.gate_up.t()
            space.inner @ w.down.t()

    body = timed(layers, 10) / len(few) * decoder.shape.layers / batch_tokens
    rows = min(HEAD_ROWS, batch_tokens)
    logits = torch.empty(rows, decoder.shape.vocabulary, device=DEVICE, dtype=torch.bfloat16)
    head = timed(lambda: torch.mm(space.x[:rows], decoder.weights.head.t(), out=logits), 10)
    return body + head / rows


def perplexity(model: str, batch_tokens: int) -> Result:
    """Windows of 2,048 tokens, every one predicted: by the decoder, by transformers' body and a chunked head, and the
    products alone."""
    decoder = decoder_of(model, batch_tokens)
    ids = np.random.default_rng(0).integers(3, config_of(model).vocab_size, WINDOWS * WINDOW).astype(np.int32)
    windows = plan("window", [ids], WINDOW)
    scorer, tokens = Scorer(decoder, HEAD_ROWS), WINDOWS * WINDOW
    with tempfile.TemporaryDirectory() as folder:
        config_of(model).save_pretrained(folder)
        other = model_of(decoder, folder)
    ours = _seconds(lambda: by_decoder(scorer, windows))
    plain = _seconds(lambda: by_model(other, windows[: WINDOWS // 4])) * 4
    floor = products(decoder, batch_tokens) * tokens
    return {
        "tokens_per_s": round(tokens / ours),
        "transformers_tokens_per_s": round(tokens / plain),
        "floor_tokens_per_s": round(tokens / floor),
        "of_floor": round(floor / ours, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def completions(model: str, batch_tokens: int) -> Result:
    """Seeded draws against the same engine without them; neurons taken away in the decoder's weights and back, seen by
    transformers' model."""
    decoder = decoder_of(model, batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        config_of(model).save_pretrained(folder)
        other = model_of(decoder, Path(folder).as_posix())
    other.generation_config.eos_token_id = Words.eos_token_id
    prompts = np.random.default_rng(1).integers(3, config_of(model).vocab_size, (PROMPTS, PROMPT_TOKENS)).tolist()
    how = Completing(SAMPLES, NEW, 0.7, 0, BATCH)
    words = cast("PreTrainedTokenizerBase", Words())
    drawn, plain = (
        _seconds(lambda h=h: complete(other, words, prompts, h)) for h in (how, replace(how, temperature=None))
    )
    pruner = Pruner(decoder.weights, FAMILIES["llama"])
    flat = np.random.default_rng(2).permutation(decoder.shape.layers * decoder.shape.inner)[:NEURONS]
    inner = decoder.shape.inner
    pruned = {f"layers.{i}.mlp.up_proj": flat[flat // inner == i] % inner for i in range(decoder.shape.layers)}
    few = torch.tensor(prompts[:4], device=DEVICE)
    with torch.inference_mode():
        before = other(few).logits
        with pruner.applied(pruned):
            inside = other(few).logits
        after = other(few).logits
    rows = PROMPTS * SAMPLES
    return {
        "completions_per_s": round(rows / drawn, 1),
        "without_noise_per_s": round(rows / plain, 1),
        "of_engine": round(plain / drawn, 3),
        "seconds_a_step": round(drawn / (rows / BATCH * NEW), 4),
        "pruned_logits_differ": not torch.equal(before, inside),
        "undone_logits_equal": torch.equal(before, after),
    }


def _seconds(run: Callable[[], object]) -> float:
    """Of the second time; what it returns lies on the host, so the device was waited for."""
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


RUNGS = {"perplexity": perplexity, "completions": completions}
