"""Rungs of training students at Qwen2.5's shapes: the base's products alone, peft's plain loop, and ours."""

import time
from collections.abc import Callable

import numpy as np
import torch

from lib.bench.shapes import SHAPES, Result, free, qwen_config, timed
from lib.checkpoint.families import FAMILIES, Shape
from lib.lora.base import Base, empty_base, whole
from lib.lora.batches import micro_batches, round_up
from lib.lora.memory import plan_training
from lib.lora.recipe import Lora
from lib.lora.rows import Row
from lib.lora.space import HEAD_ROWS, Size
from lib.lora.trainer import FastTrainer
from lib.models.load import visible_devices

STEP_ROWS, STEPS, RANK, MAX_LENGTH = 60, 12, 8, 500
STEPS_OF = {"14b": 6, "32b": 4, "72b": 2}
RATE = 2e-4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def training_rows(shape: Shape, n: int, whole: bool, seed: int = 0) -> list[Row]:
    """Lengths as in the published datasets: about 110 tokens of template and prompt, an answer of 45; the loss on the
    whole row or on the answer."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(n):
        prompt, answer = int(np.clip(rng.normal(108, 9), 80, 140)), int(np.clip(rng.normal(45, 5), 20, 60))
        ids = tuple(rng.integers(0, shape.vocabulary, prompt + answer).tolist())
        made.append(Row(ids, 1 if whole else prompt))
    return made


@torch.no_grad()
def random_base(model: str, on_host: bool = False, gpus: int = 1) -> list[Base]:
    """The same values on as many GPUs as wanted."""
    config, devices = qwen_config(SHAPES[model]), visible_devices()[:gpus]
    bases = empty_base(FAMILIES["qwen2"], config, RANK, torch.bfloat16, devices, round_up(MAX_LENGTH), on_host)
    weights = whole(bases)
    for number, layer in enumerate(weights.layers):
        torch.cuda.manual_seed_all(number)
        for norm in (layer.norm1, layer.norm2):
            norm.fill_(1)
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            for rows in matrix.split(4096):
                rows.normal_(0, 0.02)
    weights.norm.fill_(1)
    torch.manual_seed(len(weights.layers))  # of the CPU too
    weights.embedding.normal_(0, 0.02)
    if SHAPES[model].tied:
        weights.head.copy_(weights.embedding)
    else:
        weights.head.normal_(0, 0.02)
    return bases


@torch.no_grad()
def floor_seconds(base: Base, tokens: int, predictions: int, forwards: int = 1) -> float:
    """The base's merged products, `forwards` times forward and once to the input's gradient, and the head's; back to
    back, several layers in turn so that none stays in the cache."""
    s = base.shape

    def make(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)

    layers = min(4, s.layers)
    few = [(w.qkv, w.o, w.gate_up, w.down) for w in base.stack.layers(s.hidden)[:layers]]
    table = base.head
    assert table is not None
    narrow, wide = make(tokens, s.hidden), make(tokens, 2 * s.inner)
    qkv, inner, attended = make(tokens, s.qkv), make(tokens, s.inner), make(tokens, s.heads * s.head)

    def body() -> None:
        for q, o, g, d in few:
            for _ in range(forwards):
                torch.mm(narrow, q.t(), out=qkv)
                torch.mm(attended, o.t(), out=narrow)
                torch.mm(narrow, g.t(), out=wide)
                torch.mm(inner, d.t(), out=narrow)
            torch.mm(narrow, d, out=inner)
            torch.mm(wide, g, out=narrow)
            torch.mm(narrow, o, out=attended)
            torch.mm(qkv, q, out=narrow)

    found = timed(body, 10) / layers * s.layers
    rows = min(HEAD_ROWS, predictions)
    logits = make(rows, s.vocabulary)

    def head() -> None:
        torch.mm(narrow[:rows], table.t(), out=logits)
        torch.mm(logits, table, out=narrow[:rows])

    return found + timed(head, 5) * predictions / rows


def ours(model: str, batch_tokens: int) -> Result:
    """Tokens/s of whole steps, of the loss on the answer and on the whole row, beside the products in the same run."""
    shape, free_now, count = SHAPES[model], torch.cuda.mem_get_info()[0], STEPS_OF.get(model, STEPS)
    plan = plan_training(shape, RANK, 2, batch_tokens, 256, free_now)
    recompute, [base], found = plan.size.recompute, random_base(model, plan.embed_on_host), Result()
    for name, entire in (("answer", False), ("row", True)):
        torch.cuda.reset_peak_memory_stats()
        rows = training_rows(base.shape, STEP_ROWS * count, entire)
        size, planned = plan.size, plan.need
        began = time.perf_counter()
        trainer = FastTrainer(base, Lora(rank=RANK, alpha=RANK), size, STEP_ROWS)
        trainer.begin(1)
        steps = [rows[i * STEP_ROWS : (i + 1) * STEP_ROWS] for i in range(count)]
        trainer.step(steps[0], RATE, 1)
        first = time.perf_counter() - began
        for number, step in enumerate(steps[1:], 2):  # every size is captured
            trainer.step(step, RATE, number)
        began = time.perf_counter()
        losses = [
            trainer.step(step, RATE, count + 1 + i, steps[(i + 1) % count])["loss"] for i, step in enumerate(steps)
        ]
        seconds = time.perf_counter() - began
        peak, tokens = torch.cuda.max_memory_allocated(), sum(len(row.ids) for row in rows)
        parts = [micro for step in steps for micro in micro_batches(step, size.tokens)]
        trainer.run = trainer.adapter = None  # type: ignore[assignment]: its memory
        free()
        floor = sum(
            floor_seconds(base, t, p, 2 if recompute else 1) * n
            for (t, p), n in _counted([(min(m.size[0], size.tokens), m.scored) for m in parts]).items()
        )
        found |= {
            f"{name}_tokens_per_s": round(tokens / seconds),
            f"{name}_floor_tokens_per_s": round(tokens / floor),
            f"{name}_of_floor": round(floor / seconds, 3),
            f"{name}_first_step_s": round(first, 2),
            f"{name}_micro_batches": len(parts) / count,
            f"{name}_loss": round(losses[-1], 4),
            f"{name}_peak_gib": round(peak / 2**30, 2),
            f"{name}_planned_gib": round(planned / 2**30, 2),
        }
    return found


def _counted(sizes: list[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Sizes rounded to a few, with how often each occurs."""
    rounded = [(t, round_up(p)) for t, p in sizes]
    return {size: rounded.count(size) for size in sorted(set(rounded))}


def plain(model: str, batch_tokens: int) -> Result:
    """peft's own layers in transformers' model, padded batches of 20 rows, three to a step, torch's AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2ForCausalLM

    config = qwen_config(SHAPES[model])
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        bare = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    student = get_peft_model(bare, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS))
    trained = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    rows = training_rows(SHAPES[model], STEP_ROWS * 4, True)

    def step(some: list[Row]) -> None:
        scored = sum(row.scored for row in some)
        for start in range(0, len(some), 20):
            batch = some[start : start + 20]
            width = max(len(row.ids) for row in batch)
            ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for i, row in enumerate(batch):
                ids[i, : len(row.ids)] = labels[i, : len(row.ids)] = torch.tensor(row.ids)
                mask[i, : len(row.ids)] = 1
            with torch.autocast("cuda", torch.bfloat16):
                out = student(ids.cuda(), attention_mask=mask.cuda(), labels=labels.cuda(), num_items_in_batch=scored)
            out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    step(rows[:STEP_ROWS])
    torch.cuda.synchronize()
    began = time.perf_counter()
    for i in range(1, 4):
        step(rows[i * STEP_ROWS : (i + 1) * STEP_ROWS])
    torch.cuda.synchronize()
    tokens = sum(len(row.ids) for row in rows[STEP_ROWS:])
    return {
        "tokens_per_s": round(tokens / (time.perf_counter() - began)),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def repeat(model: str, batch_tokens: int) -> Result:
    """The same steps twice, one time with another student between: the same bits."""
    [base] = random_base(model)
    rows = training_rows(base.shape, STEP_ROWS * 6, True)
    steps = [rows[i * STEP_ROWS : (i + 1) * STEP_ROWS] for i in range(6)]
    trainer = FastTrainer(base, Lora(rank=RANK, alpha=RANK), Size(batch_tokens, batch_tokens, False), STEP_ROWS)

    def train(seed: int, start: int = 0) -> torch.Tensor:
        if start == 0:
            trainer.begin(seed)
        for number in range(start, 6):
            trainer.step(steps[number], RATE, number + 1)
        return trainer.adapter.values.clone()

    first, other = train(1), train(2)
    again = train(1)
    trainer.begin(1)
    for number in range(3):
        trainer.step(steps[number], RATE, number + 1)
    state = trainer.state()
    train(2)
    trainer.load(state)
    resumed = train(1, 3)
    return {
        "same_bits_again": torch.equal(first, again),
        "same_bits_resumed": torch.equal(first, resumed),
        "other_differs": not torch.equal(first, other),
    }


RUNGS: dict[str, Callable[[str, int], Result]] = {"train": ours, "train-plain": plain, "train-repeat": repeat}
