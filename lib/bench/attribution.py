"""Rungs of attribution: seconds a sample of 2,048 tokens, and a short prompt, beside the floor and the plain loop."""

import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from lib.attribution.attribute import Attributor, Scores
from lib.attribution.memory import GIB, Memory, plan_memory
from lib.attribution.patch import linear_layers, patched
from lib.bench import pruning
from lib.bench.attribution_exact import Options, exact
from lib.bench.llamas import LLAMAS, PROMPT_TOKENS, PROMPTS, SAMPLES, TOKENS, config_of, random_model, samples
from lib.bench.shapes import Result, free, timed
from lib.models.load import load_model


def clock(run: Callable[[], object], count: int, repeats: int = 3) -> float:
    """Median seconds a sample by the host's clock, the device waited for, after one warm run."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / count)
    return statistics.median(found[1:])


def floor(model: str, batch_tokens: int) -> Result:
    """The layers' own products back to back: forward, the inputs' gradients, the weights' gradients."""
    layers, hidden, inner, heads, kv, _ = LLAMAS[model]
    width = kv * hidden // heads
    sizes = [(hidden, hidden), (width, hidden), (width, hidden), (hidden, hidden)]
    sizes += [(inner, hidden), (inner, hidden), (hidden, inner)]

    def make(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    weights = [[make(*size) for size in sizes] for _ in range(4)]
    given = {n: make(TOKENS, n) for n in (hidden, width, inner)}

    def run(forward: bool, gradients: str) -> None:
        for layer in weights:
            for number, w in enumerate(layer):
                if forward:
                    given[w.shape[1]] @ w.t()
                    given[w.shape[0]] @ w
                if gradients == "all" or (gradients == "up" and number == 5):
                    given[w.shape[0]].t() @ given[w.shape[1]]

    def seconds(forward: bool, gradients: str) -> float:
        return timed(lambda: run(forward, gradients), 20) / 4 * layers

    values = sum(a * b for a, b in sizes) * layers
    both = seconds(True, "")
    return {
        "products_s": round(both, 4),
        "with_up_proj_gradients_s": round(seconds(True, "up"), 4),
        "with_all_gradients_s": round(seconds(True, "all"), 4),
        "tflop_neuron": round(2 * TOKENS * (2 * values + layers * hidden * inner) / 1e12, 1),
        "tflop_weight": round(2 * TOKENS * 3 * values / 1e12, 1),
    }


def ours(model: str, batch_tokens: int) -> Result:
    """Attributor as the job runs it, in each mode."""
    hf, some = random_model(model), samples(model, SAMPLES)
    batch = max(1, batch_tokens // TOKENS)
    found: Result = {}
    modes: dict[str, Options] = {
        "both_neuron_scores": {},
        "signed_only": {"scores": ("signed",)},
        "both_and_wanda": {"wanda": True},
        "wanda_alone": {"scores": (), "wanda": True},
        "both_recomputing": {},
        "weight_abs_all": {"level": "weight", "layers": "all", "scores": ("abs",), "batch": 4},
    }
    for name, options in modes.items():
        free()
        how: Options = {"batch": batch, **options}
        run = Attributor(hf, width=TOKENS, recompute=name == "both_recomputing", **how)
        found[f"{name}_s"] = round(clock(lambda r=run: r.run(some), SAMPLES), 4)
        found[f"{name}_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        found[f"{name}_planned_gib"] = round(_planned(model, run).need / GIB, 2)
    prompts = samples(model, PROMPTS, PROMPT_TOKENS)
    free()
    short = Attributor(hf, batch=PROMPTS, width=PROMPT_TOKENS)
    found["short_prompt_s"] = round(clock(lambda: short.run(prompts), PROMPTS), 5)
    signed = Attributor(hf, batch=PROMPTS, width=PROMPT_TOKENS, scores=("signed",))
    found["short_prompt_signed_s"] = round(clock(lambda: signed.run(prompts), PROMPTS), 5)
    one = Attributor(hf, batch=1, width=PROMPT_TOKENS)
    found["short_prompt_one_by_one_s"] = round(clock(lambda: one.run(prompts[:16]), 16), 5)
    return found


def _planned(model: str, run: Attributor) -> Memory:
    shapes = _shapes(run)
    total = sum(p.numel() * p.element_size() for p in random_model(model).parameters())
    return plan_memory(
        config_of(model),
        total,
        shapes,
        level=run.level,
        scores=run.scores,
        batch=(run.batch or 1, TOKENS),
        itemsize=2,
        devices=1,
        free=torch.cuda.mem_get_info()[1],
        recompute=run.recompute,
    )


def _shapes(run: Attributor) -> dict[str, tuple[int, int]]:
    return {name: (linear.out_features, linear.in_features) for name, linear in run.linears.items()}


def plain(model: str, batch_tokens: int) -> Result:
    """transformers' own passes: forward; forward and every weight's gradient, without scores and without rules."""
    hf, some = random_model(model), torch.tensor(samples(model, 4))

    def forward() -> None:
        for row in some:
            hf(input_ids=row[None].cuda(), use_cache=False, logits_to_keep=1)

    def backward() -> None:
        for row in some:
            hf(input_ids=row[None].cuda(), use_cache=False, logits_to_keep=1).logits[0, -1].max().backward()
            hf.zero_grad(set_to_none=True)

    with torch.no_grad():
        found: Result = {"forward_s": round(clock(forward, 4), 4)}
    linears = linear_layers(hf).values()
    for linear in linears:
        linear.weight.requires_grad_(True)
    try:
        found["forward_backward_s"] = round(clock(backward, 4), 4)
        with patched(hf):
            found["forward_backward_patched_s"] = round(clock(backward, 4), 4)
    finally:
        for linear in linears:
            linear.weight.requires_grad_(False)
    return found


def seed_loop(model: str, batch_tokens: int) -> Result:
    """As the published loops do it: every score moved to the CPU and added there in float32."""
    hf, some = random_model(model), torch.tensor(samples(model, 3))
    linears = linear_layers(hf)
    totals = {name: torch.zeros(m.weight.shape) for name, m in linears.items()}
    seconds = []
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    try:
        for row in some:
            start = time.perf_counter()
            with patched(hf):
                hf(input_ids=row[None].cuda(), use_cache=False).logits[0, -1].max().backward()
            for name, linear in linears.items():
                assert linear.weight.grad is not None
                totals[name] += (linear.weight * linear.weight.grad).abs().cpu().float()
            hf.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
    finally:
        for linear in linears.values():
            linear.weight.requires_grad_(False)
    return {"s": round(min(seconds[1:]), 2)}


def bits(model: str, batch_tokens: int) -> Result:
    """The same samples in another order, in other company, alone, again, recomputed: values that differ in any bit."""
    hf, some = random_model(model), samples(model, 6, 512)
    run = Attributor(hf, layers="all", batch=4, width=512)
    first = run.run(some)

    def differ(other: Scores, order: list[int]) -> int:
        parts = ((first.signed, other.signed), (first.abs, other.abs))
        return sum(int((a[n][order].cpu() != b[n].cpu()).sum()) for a, b in parts for n in first.layers)

    again = Attributor(hf, layers="all", batch=4, width=512, recompute=True)
    turned = [4, 2, 5, 0, 1, 3]
    return {
        "values": sum(2 * v.numel() for v in first.abs.values()),
        "differ_again": differ(run.run(some), list(range(6))),
        "differ_in_other_order": differ(run.run([some[i] for i in turned]), turned),
        "differ_alone": differ(run.run(some[3:4]), [3]),
        "differ_recomputed": differ(again.run(some), list(range(6))),
    }


def small_memory(model: str, batch_tokens: int) -> Result:
    """The same with less memory: an A100-40GB's, and so little that activations have to be computed again."""
    hf, some, total = random_model(model), samples(model, 4), torch.cuda.mem_get_info()[1]
    weights = sum(p.numel() * p.element_size() for p in hf.parameters())
    found: Result = {}
    for name, room, batch in (("a100_40gb", 39.4, batch_tokens // TOKENS), ("tight", 20.0, 1)):
        free()
        torch.cuda.set_per_process_memory_fraction(room * GIB / total)
        try:
            run = Attributor(hf, batch=batch, width=TOKENS)
            memory = plan_memory(
                config_of(model),
                weights,
                _shapes(run),
                level="neuron",
                scores=("signed", "abs"),
                batch=(batch, TOKENS),
                itemsize=2,
                devices=1,
                free=int(room * GIB),
            )
            run.recompute = memory.recompute
            found[f"{name}_s"] = round(clock(lambda r=run: r.run(some), 4, 1), 4)
            found[f"{name}_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
            found[f"{name}_plan"] = str(memory)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def several(model: str, batch_tokens: int) -> Result:
    """Layers over all GPUs: seconds a sample, how busy each was, and a small model's scores against one GPU's."""
    gpus = torch.cuda.device_count()
    small = samples("llama-small", 8, 256)
    with tempfile.TemporaryDirectory() as folder:
        random_model("llama-small").save_pretrained(folder)
        devices = [torch.device("cuda", i) for i in range(gpus)]
        one, many = (
            Attributor(load_model(folder, "bfloat16", "sdpa", some), width=256, batch=1).run(small)
            for some in (devices[:1], devices)
        )
    same = all(torch.equal(one.abs[n].cpu(), many.abs[n].cpu()) for n in one.layers)
    same = same and all(torch.equal(one.signed[n].cpu(), many.signed[n].cpu()) for n in one.layers)
    hf, some = random_model(model, gpus), samples(model, 8 * gpus)
    run = Attributor(hf, batch=1, width=TOKENS)
    run.run(some[: 2 * gpus])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        start = time.perf_counter()
        run.run(some)
        for i in range(gpus):
            torch.cuda.synchronize(i)
        wall = time.perf_counter() - start
    busy = [0.0] * gpus
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            busy[event.device_index] += event.time_range.elapsed_us() / 1e6
    return {
        "gpus": gpus,
        "small_model_same_bits_as_one_gpu": same,
        "both_neuron_scores_s": round(wall / len(some), 4),
        "busy_share_of_each": [round(b / wall, 3) for b in busy],
        "peak_gib_of_each": [round(torch.cuda.max_memory_allocated(i) / GIB, 1) for i in range(gpus)],
    }


def job(model: str, batch_tokens: int) -> Result:
    """The job as a whole; its parts need packages that the other rungs do without."""
    from lib.bench.attribution_whole import job as whole

    return whole(model)


RUNGS: dict[str, Callable[[str, int], Result]] = {
    "floor": floor,
    "plain": plain,
    "ours": ours,
    "seed": seed_loop,
    "bits": bits,
    "memory": small_memory,
    "exact": exact,
    "several": several,
    "job": job,
    **pruning.RUNGS,
}
