"""Rungs of scoring: a row is one pass over a response in its context; a log-likelihood shift takes two."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lib.bench.shapes import (
    HEAD_ROWS,
    NAIVE_ROWS,
    PREFIX,
    ROWS,
    SHAPES,
    Result,
    flops,
    qwen_config,
    random_decoder,
    rows,
    timed,
)
from lib.bench.whole import cells, job, loading
from lib.models.load import GIB, plan_decoder
from lib.models.scorer import Scorer


def floor(model: str, batch_tokens: int) -> Result:
    """The model's own matrix products back to back, and the head's: nothing element-wise, no attention. Once with q, k,
    v and gate, up merged, as the scorer has them, and once apart, as the checkpoint has them."""
    shape = SHAPES[model]
    few = replace(shape, layers=min(4, shape.layers))
    decoder = random_decoder(few, batch_tokens)
    space = decoder._space(decoder.devices[0], batch_tokens)
    space.x.normal_()
    space.inner.normal_()
    attended = torch.randn(batch_tokens, shape.heads * shape.head, device="cuda").bfloat16()

    def layers(merged: bool) -> None:
        q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
        for w in decoder.weights.layers:
            for part in [w.qkv] if merged else w.qkv.split([q, kv, kv]):
                space.x @ part.t()
            attended @ w.o.t()
            for part in [w.gate_up] if merged else w.gate_up.split(shape.inner):
                space.x @ part.t()
            space.inner @ w.down.t()

    logits = torch.empty(HEAD_ROWS, shape.vocabulary, device="cuda", dtype=torch.bfloat16)
    body, apart = (timed(lambda m=m: layers(m), 20) / few.layers * shape.layers for m in (True, False))
    head = timed(lambda: torch.mm(space.x[:HEAD_ROWS], decoder.weights.head.t(), out=logits), 20)
    share = 1 / 3  # of the tokens, predictions: 45 of 135
    predictions = int(batch_tokens * share)
    work, heads = flops(shape, batch_tokens, predictions), head * predictions / HEAD_ROWS
    return {
        "tflops": round(work / (body + heads) / 1e12, 1),
        "tflops_projections_apart": round(work / (apart + heads) / 1e12, 1),
    }


def ours(model: str, batch_tokens: int) -> Result:
    """The scorer as the job runs it, prefix shared; the time of the second run over all rows, by the host's clock."""
    shape, items = SHAPES[model], rows(SHAPES[model], ROWS[model])
    total, gpus = torch.cuda.mem_get_info()[0], torch.cuda.device_count()
    memory = plan_decoder(shape, 2, batch_tokens, HEAD_ROWS, gpus, total)
    began = torch.cuda.mem_get_info()[0]
    decoder = random_decoder(shape, batch_tokens, memory.embed_on_host)
    scorer, prefix = Scorer(decoder, HEAD_ROWS), decoder.prefix(list(range(PREFIX)))
    scorer(prefix, items[: len(items) // 8])
    scorer.computed = scorer.needed = 0
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        scorer(prefix, items)
        seconds.append(time.perf_counter() - start)
    best = min(seconds)
    computed, needed = scorer.computed / 2, scorer.needed / 2
    predictions = sum(len(i.targets) for i in items)
    used = began - torch.cuda.mem_get_info()[0]
    return {
        "rows_per_s": round(len(items) / best, 1),
        "tflops_done": round(flops(shape, int(computed), predictions) / best / 1e12, 1),
        "tflops_needed": round(flops(shape, int(needed), predictions) / best / 1e12, 1),
        "tokens_needed_of_computed": round(needed / computed, 4),
        "memory_gib": round(used / GIB, 2),
        "memory_planned_gib": round(memory.need / GIB, 2),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "embedding": "host" if memory.embed_on_host else "gpu",
    }


def bits(model: str, batch_tokens: int) -> Result:
    """The same rows in another order, in other company, alone: how many values differ in any bit; and against fp32."""
    shape, items = SHAPES[model], rows(SHAPES[model], 300)
    memory = plan_decoder(shape, 2, batch_tokens, HEAD_ROWS, torch.cuda.device_count(), torch.cuda.mem_get_info()[0])
    decoder = random_decoder(shape, batch_tokens, memory.embed_on_host)
    scorer, prefix = Scorer(decoder, HEAD_ROWS), decoder.prefix(list(range(PREFIX)))
    whole = scorer(prefix, items)
    order = np.random.default_rng(1).permutation(len(items))
    shuffled = scorer(prefix, [items[i] for i in order])
    differ = sum(not np.array_equal(whole[i], s) for i, s in zip(order, shuffled, strict=True))
    alone = sum(not np.array_equal(whole[i], scorer(prefix, [items[i]])[0]) for i in range(0, 300, 30))
    higher = decoder.higher()
    fine = Scorer(higher, 128).one_by_one(higher.prefix(list(range(PREFIX))), items[:12])
    noise = [float(a.mean() - b.mean()) for a, b in zip(whole, fine, strict=False)]
    return {
        "rows": len(items),
        "rows_that_differ_shuffled": differ,
        "rows_that_differ_alone_of_10": alone,
        "bf16_minus_fp32_mean_log_prob_sd": round(float(np.std(noise)), 5),
        "worst": round(max(map(abs, noise)), 5),
    }


def naive(model: str, batch_tokens: int) -> Result:
    """Batches of 8 in file order, padded, logits at every position, fp32 log-softmax of all: the plain loop."""
    from transformers import Qwen2ForCausalLM

    if model not in NAIVE_ROWS:
        return {"skipped": "not measured for this size"}
    shape, items = SHAPES[model], rows(SHAPES[model], NAIVE_ROWS[model])
    with torch.device("cuda"):
        hf = Qwen2ForCausalLM(qwen_config(shape)).bfloat16().eval()

    def run() -> None:
        for at in range(0, len(items), 8):
            some = [[*range(PREFIX), *i.context, *i.response] for i in items[at : at + 8]]
            width = max(map(len, some))
            ids = torch.tensor([s + [0] * (width - len(s)) for s in some], device="cuda")
            mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in some], device="cuda")
            logits = hf(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
            logits[:, :-1].gather(2, ids[:, 1:, None]).cpu()

    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
    return {"rows_per_s": round(len(items) / (time.perf_counter() - start), 1)}


def vllm(model: str, batch_tokens: int) -> Result:
    """vLLM's own scoring of the same rows: prompt_logprobs=0, one token generated, prefix caching on."""

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    shape, items = SHAPES[model], rows(SHAPES[model], ROWS[model])
    folder = tempfile.mkdtemp()
    qwen_config(shape).save_pretrained(folder)
    engine = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=1024,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.85,
    )
    prompts = [{"prompt_token_ids": [*range(PREFIX), *i.context, *i.response]} for i in items]
    how = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    engine.generate(prompts[: len(prompts) // 8], how, use_tqdm=False)
    start = time.perf_counter()
    engine.generate(prompts, how, use_tqdm=False)
    return {"rows_per_s": round(len(items) / (time.perf_counter() - start), 1)}


RUNGS: dict[str, Callable[[str, int], Result]] = {
    "floor": floor,
    "naive": naive,
    "ours": ours,
    "bits": bits,
    "vllm": vllm,
    "job": job,
    "cells": cells,
    "load": loading,
}
