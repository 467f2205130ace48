"""Students over several GPUs beside one, all in one run."""

import time

import torch

from lib.base.errors import UserError, one_line
from lib.bench.lora import MAX_LENGTH, RANK, RATE, STEP_ROWS, STEPS_OF, random_base, training_rows
from lib.bench.shapes import SHAPES, Result, free, timed
from lib.lora.memory import TrainingMemory, plan_training
from lib.lora.recipe import Lora
from lib.lora.relay import ENDS, EVEN, Ends
from lib.lora.rows import Row
from lib.lora.step import Step
from lib.lora.trainer import FastTrainer, Resident, SpreadTrainer
from lib.models.decoder import on
from lib.models.load import free_memory, visible_devices

TOKENS, STEPS = (768, 1024, 1536, 2048), 6


def spread(model: str, batch_tokens: int) -> Result:
    """Tokens/s with one GPU and with all, of the loss on the whole row, by the size of a micro-batch."""
    gpus, count = torch.cuda.device_count(), STEPS_OF.get(model, STEPS)
    if gpus < 2:
        return {"skipped": "one GPU is visible"}
    rows = training_rows(SHAPES[model], STEP_ROWS * count, True)
    steps = [rows[i * STEP_ROWS : (i + 1) * STEP_ROWS] for i in range(count)]
    found = {"one": one_size(model, steps, 1, 0)}  # as the job has it: a step at once, if it fits
    for tokens in TOKENS:
        found[str(tokens)] = one_size(model, steps, gpus, tokens)
    found["1024_even"] = one_size(model, steps, gpus, 1024, EVEN)
    rates = {name: float(str(one["tokens_per_s"])) for name, one in found.items() if "tokens_per_s" in one}
    for name, rate in rates.items():
        found[name]["times"] = round(rate / rates["one"], 3) if "one" in rates else "one GPU cannot"
    return {f"{name}_{what}": figure for name, one in found.items() for what, figure in one.items()}


def one_size(model: str, steps: list[list[Row]], gpus: int, tokens: int, ends: Ends = ENDS) -> Result:
    devices = visible_devices()[:gpus]
    try:
        free()
        free_now, step_tokens = free_memory(devices), STEP_ROWS * MAX_LENGTH
        plan = plan_training(SHAPES[model], RANK, 2, step_tokens, MAX_LENGTH, free_now, gpus=gpus, tokens_each=tokens)
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        bases, lora = random_base(model, plan.embed_on_host, gpus), Lora(rank=RANK, alpha=RANK)
        if gpus == 1:
            return timed_steps(FastTrainer(bases[0], lora, plan.size, STEP_ROWS), plan, steps)
        trainer = SpreadTrainer(bases, lora, plan.size, STEP_ROWS)
        trainer.ends = ends
        return timed_steps(trainer, plan, steps) | stage_times(trainer, steps[0])
    except (RuntimeError, UserError) as e:  # the others go on
        return {"error": one_line(e)[:200]}


def timed_steps(trainer: Resident, plan: TrainingMemory, steps: list[list[Row]]) -> Result:
    """All steps twice: the second time, when every size is captured, is measured; and a student twice."""
    devices, count, adapters = [one.base.device for one in trainer.adapters], len(steps), list[list[torch.Tensor]]()
    for _ in range(2):
        trainer.begin(1)
        seconds, said = [0.0], dict[str, float]()
        for number, step in enumerate(steps, 1):
            began = time.perf_counter()
            said = trainer.step(step, RATE, number, steps[number % count])
            seconds.append(time.perf_counter() - began)
        for device in devices:
            torch.cuda.synchronize(device)
        adapters.append([one.values.clone() for one in trainer.adapters])
    parts = [micro for step in steps for micro in trainer._laid_out(step)]
    peaks = [round(torch.cuda.max_memory_allocated(device) / 2**30, 2) for device in devices]
    tokens = sum(len(row.ids) for step in steps for row in step)
    began = time.perf_counter()
    trainer._gradient(parts[: len(parts) // count], 1.0)
    launched = time.perf_counter() - began
    return {
        "tokens_per_s": round(tokens / sum(seconds)),
        "step_ms": [round(one * 1e3) for one in seconds[1:]],
        "launch_ms": round(launched * 1e3, 1),
        "micro_batches": len(parts) / count,
        "sizes": sorted({micro.size[0] for micro in parts}),
        "filled": round(tokens / sum(micro.size[0] for micro in parts), 3),
        "loss": round(said["loss"], 4),  # near to one GPU's
        "grad_norm": round(said["grad_norm"], 4),
        "recompute": plan.size.recompute,
        "same_bits_again": all(torch.equal(a, b) for a, b in zip(*adapters, strict=True)),
        "peak_gib": peaks,
        "planned_gib": round(plan.need / 2**30, 2),
    }


def stage_times(trainer: SpreadTrainer, step: list[Row]) -> Result:
    """Milliseconds of a micro-batch in each stage alone: where one is slower, the others wait for it."""
    micro, found = max(trainer._laid_out(step), key=lambda one: one.size), []
    for stage in trainer.stages.steps:

        def through(stage: Step = stage) -> None:
            if stage.base.head is not None:
                stage.turn("both", micro)
            else:
                stage.turn("forward", micro)
                stage.turn("backward", micro)

        with on(stage.base.device):
            stage.put(micro, 1.0)
            found.append(round(timed(through, 10) * 1e3, 2))
    return {"stage_ms": found, "layers": [stage.base.shape.layers for stage in trainer.stages.steps]}
