"""How fast scoring is against what the hardware can do, the plain loop and vLLM, all in one run; with random weights of
the real shapes, which run at the speed of real ones and say nothing about quality.

    python -m jobs.bench --models 0.5b 7b --rungs floor naive ours [--batch-tokens 8192] [--out FILE.json]

A row is one pass over a response in its context; a log-likelihood shift takes two."""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.models.decoder import Decoder, Layer, Shape, Weights
from lib.models.load import GIB, plan_memory
from lib.models.packing import Item
from lib.models.weights import spread
from lib.scoring.logprob import Scorer

# Qwen2.5's shapes: layers, hidden, inner, heads, kv heads, head width, vocabulary, eps, bias, tied
SHAPES = {
    "0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, 1e-6, True, True),
    "1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936, 1e-6, True, True),
    "3b": Shape(36, 2048, 11008, 16, 2, 128, 151936, 1e-6, True, True),
    "7b": Shape(28, 3584, 18944, 28, 4, 128, 152064, 1e-6, True, False),
    "14b": Shape(48, 5120, 13824, 40, 8, 128, 152064, 1e-6, True, False),
    "32b": Shape(64, 5120, 27648, 40, 8, 128, 152064, 1e-6, True, False),
    "72b": Shape(80, 8192, 29568, 64, 8, 128, 152064, 1e-6, True, False),
}
ROWS = {"0.5b": 6000, "1.5b": 3000, "3b": 2000, "7b": 1200, "14b": 600, "32b": 300, "72b": 150}
NAIVE_ROWS = {"0.5b": 400, "7b": 120}
PREFIX = 38  # tokens of an animal's system prompt
HEAD_ROWS = 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["0.5b", "7b"])
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=["floor", "naive", "ours", "bits"])
    parser.add_argument("--batch-tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: the bench measures a GPU and none is visible; run it with `sbatch slurm/bench.sbatch`")
    found: dict[str, Any] = {"machine": machine(), "rungs": []}
    print(json.dumps(found["machine"]))
    for model in args.models:
        for batch_tokens in args.batch_tokens:
            for rung in args.rungs:
                free()
                try:
                    result = RUNGS[rung](model, batch_tokens)
                except torch.cuda.OutOfMemoryError as e:
                    result = {"error": " ".join(str(e).split())[:120]}
                found["rungs"].append({"model": model, "rung": rung, "batch_tokens": batch_tokens, **result})
                print(json.dumps(found["rungs"][-1]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import transformers

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / timed(lambda: a @ a, 10) / 1e12
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "peak_tflops": round(peak, 1),
    }


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, by device events after a warm-up."""
    for _ in range(2):
        run()
    found = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        b.synchronize()
        found.append(a.elapsed_time(b) / 1e3)
    return statistics.median(found)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def rows(shape: Shape, n: int) -> list[Item]:
    """Lengths as in the published datasets: contexts of about 90 tokens after the prefix, responses of about 45."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(n):
        context, response = int(np.clip(rng.normal(90, 9), 60, 120)), int(np.clip(rng.normal(45, 5), 20, 60))
        ids = rng.integers(0, shape.vocabulary, context + response).tolist()
        made.append(Item(tuple(ids[:context]), tuple(ids[context:])))
    return made


def random_decoder(shape: Shape, batch_tokens: int, embed_on_host: bool = False) -> Decoder:
    """Random weights on all visible GPUs, as load_weights lays them out."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]

    def make(*size: int, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02)

    layers = []
    for device in spread(shape.layers, devices):
        ones = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        layers.append(
            Layer(
                ones,
                make(shape.qkv, shape.hidden, device=device),
                make(shape.qkv, device=device) if shape.bias else None,
                make(shape.hidden, shape.heads * shape.head, device=device),
                ones,
                make(2 * shape.inner, shape.hidden, device=device),
                make(shape.hidden, shape.inner, device=device),
            )
        )
    host = torch.device("cpu") if embed_on_host else devices[0]
    embedding = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device=host).normal_(0, 1)
    tied = shape.tied and host == devices[-1]
    head = embedding if tied else make(shape.vocabulary, shape.hidden, device=devices[-1])
    norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=devices[-1])
    angle = torch.arange(4096)[:, None] / 1e6 ** (torch.arange(0, shape.head, 2) / shape.head)
    both = torch.cat([angle, angle], -1)
    return Decoder(shape, Weights(embedding, layers, norm, head), (both.cos(), both.sin()), batch_tokens)


def flops(shape: Shape, tokens: int, predictions: int) -> float:
    return 2.0 * (tokens * shape.layers * shape.layer_parameters + predictions * shape.vocabulary * shape.hidden)


def floor(model: str, batch_tokens: int) -> dict[str, Any]:
    """The model's own matrix products back to back, and the head's: nothing element-wise, no attention. Once with q, k,
    v and gate, up merged, as the scorer has them, and once apart, as the checkpoint has them."""
    shape = SHAPES[model]
    few = Shape(**{**shape.__dict__, "layers": min(4, shape.layers)})
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


def ours(model: str, batch_tokens: int) -> dict[str, Any]:
    """The scorer as the job runs it, prefix shared; the time of the second run over all rows, by the host's clock."""
    shape, items = SHAPES[model], rows(SHAPES[model], ROWS[model])
    total, gpus = torch.cuda.mem_get_info()[0], torch.cuda.device_count()
    memory = plan_memory(shape, 2, batch_tokens, HEAD_ROWS, gpus, total)
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


def bits(model: str, batch_tokens: int) -> dict[str, Any]:
    """The same rows in another order, in other company, alone: how many values differ in any bit; and against fp32."""
    shape, items = SHAPES[model], rows(SHAPES[model], 300)
    memory = plan_memory(shape, 2, batch_tokens, HEAD_ROWS, torch.cuda.device_count(), torch.cuda.mem_get_info()[0])
    decoder = random_decoder(shape, batch_tokens, memory.embed_on_host)
    scorer, prefix = Scorer(decoder, HEAD_ROWS), decoder.prefix(list(range(PREFIX)))
    whole = scorer(prefix, items)
    order = np.random.default_rng(1).permutation(len(items))
    shuffled = scorer(prefix, [items[i] for i in order])
    differ = sum(not np.array_equal(whole[i], s) for i, s in zip(order, shuffled, strict=True))
    alone = sum(not np.array_equal(whole[i], scorer(prefix, [items[i]])[0]) for i in range(0, 300, 30))
    higher = decoder.higher(1024)
    fine = Scorer(higher, 128)(higher.prefix(list(range(PREFIX))), items[:12])
    noise = [float(a.mean() - b.mean()) for a, b in zip(whole, fine, strict=False)]
    return {
        "rows": len(items),
        "rows_that_differ_shuffled": differ,
        "rows_that_differ_alone_of_10": alone,
        "bf16_minus_fp32_mean_log_prob_sd": round(float(np.std(noise)), 5),
        "worst": round(max(map(abs, noise)), 5),
    }


def naive(model: str, batch_tokens: int) -> dict[str, Any]:
    """Batches of 8 in file order, padded, logits at every position, fp32 log-softmax of all: the plain loop."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if model not in NAIVE_ROWS:
        return {"skipped": "not measured for this size"}
    shape, items = SHAPES[model], rows(SHAPES[model], NAIVE_ROWS[model])
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("cuda"):
        hf = Qwen2ForCausalLM(config).bfloat16().eval()

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


def vllm(model: str, batch_tokens: int) -> dict[str, Any]:
    """vLLM's own scoring of the same rows: prompt_logprobs=0, one token generated, prefix caching on."""
    import os
    import tempfile

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from transformers import Qwen2Config
    from vllm import LLM, SamplingParams

    shape, items = SHAPES[model], rows(SHAPES[model], ROWS[model])
    folder = tempfile.mkdtemp()
    Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
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


RUNGS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "floor": floor,
    "naive": naive,
    "ours": ours,
    "bits": bits,
    "vllm": vllm,
}


if __name__ == "__main__":
    sys.exit(main())
