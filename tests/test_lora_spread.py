"""A model over several devices: the gradient, adapter and state that it has on one. Here all devices are the CPU, and
what goes from one stage to the next is copied."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.base.errors import UserError
from lib.bench.shapes import SHAPES
from lib.lora.base import cut, load_base, load_stages
from lib.lora.batches import FINE, micro_batches
from lib.lora.memory import TrainingMemory, plan_training, stages_memory
from lib.lora.recipe import Lora
from lib.lora.relay import ENDS, EVEN, slots, times, turns
from lib.lora.rows import Row
from lib.lora.space import Size
from lib.lora.trainer import FastTrainer, Resident, SpreadTrainer
from tests.streams import Watch
from tests.test_lora_step import loss_of, peft_model, ragged_rows, storages, with_random_b
from tests.tools import tiny_llama, tiny_model

CPU = torch.device("cpu")
RANK, ALPHA = 3, 5.0
THIN, AGAIN = Size(128, 128, False), Size(128, 128, True)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    """Four layers of a Qwen2 under the embedding, three of a Llama under a head of its own."""
    where = tmp_path_factory.mktemp(request.param)
    return tiny_model(where, layers=4) if request.param == "tied" else tiny_llama(where)


def trainer(folder: Path, stages: int, size: Size = THIN, dtype: str = "float32", **more: object) -> Resident:
    """Micro-batches are cut alike, whatever the stages."""
    lora = Lora(rank=RANK, alpha=ALPHA, **more)
    made: Resident
    if stages == 1:
        made = FastTrainer(load_base(str(folder), dtype, RANK, 64), lora, size, 24)
        made.grain, made.ends = FINE, ENDS
    else:
        made = SpreadTrainer(load_stages(str(folder), dtype, RANK, 64, [CPU] * stages), lora, size, 24)
    made.begin(1)
    return made


def steps_of(counts: tuple[int, ...]) -> list[list[Row]]:
    return [ragged_rows(n, seed) for seed, n in enumerate(counts)]


def trained(made: Resident, steps: list[list[Row]], start: int = 0) -> list[float]:
    """The loss and the norm of each step; every other step is laid out while the one before is computed."""
    after = {n: steps[n + 1] for n in range(0, len(steps) - 1, 2)}
    found = [made.step(steps[n], 0.01, n + 1, after.get(n, ())) for n in range(start, len(steps))]
    return [one[what] for one in found for what in ("loss", "grad_norm")]


def named_gradients(made: Resident) -> dict[str, torch.Tensor]:
    return {name: one for adapter in made.adapters for name, one in adapter.named(adapter.gradient)}


def must_be_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("size", [THIN, AGAIN], ids=["kept", "again"])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_have_the_bits_of_one_device(folder, stages, size):
    """Losses, gradients, adapter and moments, of steps of a few to many micro-batches. The norm is summed up stage
    by stage, so that its last bit may differ, and with it what is clipped: nothing is, here."""
    steps = steps_of((24, 3, 7, 24))
    one, spread = trainer(folder, 1, size, clip=1e9), trainer(folder, stages, size, clip=1e9)
    assert [len(list(micro_batches(rows, 128, FINE, ENDS))) for rows in steps] == [6, 3, 4, 5]
    for number, rows in enumerate(steps, 1):
        a, b = (made.step(rows, 0.01, number) for made in (one, spread))
        assert a["loss"] == b["loss"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
        must_be_equal(named_gradients(one), named_gradients(spread))
        must_be_equal(one.state(), spread.state())


def test_the_gradient_is_that_of_plain_peft(folder):
    """In float64, by transformers' model, row by row; with random B, so that A has a gradient too."""
    rows, made = ragged_rows(24, 0), trainer(folder, 3, dtype="float64", clip=1e9)
    made.load(with_random_b(made.state()))
    model = peft_model(folder, made.state(), torch.float64)
    loss = loss_of(model, rows)
    loss.backward()
    found, named = made.step(rows, 0.0, 1), dict(model.named_parameters())
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-7)
    for name, value in named_gradients(made).items():
        wanted = named[name.replace(".weight", ".default.weight")].grad
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_a_student_goes_on_with_another_number_of_devices(folder, before, after):
    steps = steps_of((8, 9, 10, 11))
    whole, first, then = (trainer(folder, stages, clip=1e9) for stages in (1, before, after))
    trained(whole, steps)
    trained(first, steps[:2])
    then.begin(9)
    then.load({name: one.clone() for name, one in first.state().items()})
    trained(then, steps, start=2)
    must_be_equal(whole.state(), then.state())


def test_a_loss_that_is_none_is_said_and_the_next_student_does_not_know_of_it(folder):
    steps = steps_of((24, 9, 24))
    made = trainer(folder, 2)
    first = trained(made, steps), made.state()
    made.begin(3)
    made.step(steps[0], float("inf"), 1)
    assert not math.isfinite(made.step(steps[1], 0.01, 2)["loss"])
    made.begin(1)
    assert trained(made, steps) == first[0]
    must_be_equal(made.state(), first[1])


def test_the_gradient_is_clipped_by_the_norm_of_all_stages(folder):
    """Adam's first moment after one step is a tenth of what the gradient was brought down to."""
    rows, clip = ragged_rows(24, 0), 0.25
    free, made = (trainer(folder, 3, dtype="float64", clip=most) for most in (1e9, clip))
    for one in (free, made):
        found = one.step(rows, 0.01, 1)
    norm = math.sqrt(sum(one.square().sum().item() for one in named_gradients(free).values()))
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-12) and norm > 1.5 * clip
    moments = {name: one for name, one in made.state().items() if name.startswith("adam.m.")}
    down = math.sqrt(sum(one.square().sum().item() for one in moments.values()))
    assert down == pytest.approx(0.1 * clip, rel=1e-4)


@pytest.mark.parametrize("size", [THIN, AGAIN], ids=["kept", "again"])
def test_memory_of_every_stage_is_planned_to_the_byte(folder, size):
    """Weights with the adapter's copies, the adapter, activations of all slots, and parcels that are sent or come."""
    made = trainer(folder, 3, size)
    assert isinstance(made, SpreadTrainer)
    steps, onwards, back = made.stages.steps, made.stages.onwards, made.stages.back
    shape = replace(steps[0].base.shape, layers=sum(step.base.shape.layers for step in steps))
    plans = stages_memory(shape, RANK, 4, size, False, 0, 4, 3)
    for i, (plan, step, adapter) in enumerate(zip(plans, steps, made.adapters, strict=True)):
        base, room = step.base, slots(3)[i]
        ends = [one for one in (base.embedding, base.norm, base.head) if one is not None]
        assert storages(base.stack, *ends) == plan.weights
        assert storages(adapter, adapter.products) == plan.adapter
        sent = [link.sent_MD for link in (*onwards[i : i + 1], *back[:i][-1:])]
        came = [one for link in (*back[i : i + 1], *onwards[:i][-1:]) for one in link.came]
        tables = room * (2 * 128 * base.shape.head * 4 + (128 * 16 if i == 2 else 0) + 4)  # as on one device
        spaces = storages(*step.spaces, *(space.kept for space in step.spaces), *sent, *came)
        assert spaces == plan.activations + tables


def test_a_model_that_no_gpu_holds_is_spread_over_several():
    """72B on 80 GB: not on one, on two with layers computed again, on four without; longer rows in larger batches."""

    def plan(gpus: int, longest: int = 500) -> TrainingMemory:
        return plan_training(SHAPES["72b"], 8, 2, 60 * 500, longest, int(78.6 * 2**30), gpus=gpus)

    with pytest.raises(UserError, match=r"or for more of them \(run\.gpus\)"):
        plan(1)
    assert plan(2).size == Size(1024, 1024, True) and plan(4).size == Size(1024, 1024, False)
    assert plan(4, 1100).size.tokens == 1536
    assert "a GPU, the fullest of 2: 7" in str(plan(2)) and "a GPU" not in str(plan(2)).split(": ", 1)[1].split(";")[0]


def test_what_goes_between_devices_is_never_written_while_it_is_read(folder, monkeypatch):
    """By the order that streams and events give, not by the host's: each parcel is packed after it was computed, copied
    after it was packed and its place emptied, and taken after it came."""
    made = trainer(folder, 3)
    assert isinstance(made, SpreadTrainer)
    watch = Watch(monkeypatch, made.stages)
    trained(made, steps_of((24, 24)))
    assert watch.races == [] and watch.crossed == 2 * 2 * (6 + 6)


WAYS = [(stages, micros) for stages in range(1, 6) for micros in range(1, 12)]


@pytest.mark.parametrize(("stages", "micros"), WAYS)
def test_no_turn_waits_for_one_that_comes_later_and_none_takes_anothers_place(stages, micros):
    """By brute force: every turn once, after those it takes from; a stage's slots, and the parcels between stages,
    which have the slots' numbers, are free when they are filled; gradients are added in the micro-batches' order."""
    room, done, last = slots(stages), set[tuple[int, str, int]](), stages - 1
    kept: list[dict[int, int]] = [{} for _ in range(stages)]
    onwards: list[dict[int, int]] = [{} for _ in range(stages)]  # parcels that came and were not taken
    back: list[dict[int, int]] = [{} for _ in range(stages)]
    for turn in turns(stages, micros):
        s, n = turn.stage, turn.micro
        assert turn.way in (("both",) if s == last else ("forward", "backward"))
        if turn.way != "backward":
            assert s == 0 or onwards[s].pop(n % room[s - 1]) == n
            assert n % room[s] not in kept[s] and ("forward", s, n) not in done
            kept[s][n % room[s]] = n
            done.add(("forward", s, n))
            if s < last:
                assert n % room[s] not in onwards[s + 1]
                onwards[s + 1][n % room[s]] = n
        if turn.way != "forward":
            assert s == last or back[s].pop(n % room[s]) == n
            assert kept[s].pop(n % room[s]) == n and (n == 0 or ("backward", s, n - 1) in done)
            done.add(("backward", s, n))
            if s:
                assert n % room[s - 1] not in back[s - 1]
                back[s - 1][n % room[s - 1]] = n
    assert len(done) == 2 * stages * micros and not any([*kept, *onwards, *back])


@pytest.mark.parametrize(("stages", "micros"), WAYS)
def test_stages_that_are_equally_fast_lose_the_first_and_the_last_turns_alone(stages, micros):
    """The bound of any such order: m + p - 1 micro-batches' time; and a parcel that takes a while is waited for at the
    two ends alone."""
    assert seconds(stages, micros, 0.0) == 3 * (micros + stages - 1)
    assert times(stages, micros) == pytest.approx(3 * micros * stages / seconds(stages, micros, 0.0))
    if stages <= 3:
        assert seconds(stages, micros, 0.1) == pytest.approx(3 * (micros + stages - 1) + 0.2 * (stages - 1))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_small_batches_at_both_ends_let_stages_wait_less(stages):
    """Of 60 rows like those that are trained on, where a micro-batch takes time by its tokens and that of 100 more."""
    rows = [Row(tuple(range(n)), 1) for n in np.random.default_rng(0).integers(140, 165, 60).tolist()]
    found = {}
    for ends in (EVEN, ENDS):
        sizes = [micro.size[0] for micro in micro_batches(rows, 1024, FINE, ends)]
        assert max(sizes) <= 1024 and sum(sizes) < 1.06 * sum(len(row.ids) for row in rows)
        found[ends] = seconds(stages, len(sizes), 0.0, [size + 100 for size in sizes])
    assert found[ENDS] < 0.98 * found[EVEN]


def seconds(stages: int, micros: int, away: float, sizes: Sequence[int] = ()) -> float:
    """Of a step, where a forward takes 1, a backward 2, each times its size, and a parcel `away`."""
    free, ended = [0.0] * stages, dict[tuple[str, int, int], float]()
    for turn in turns(stages, micros):
        s, n = turn.stage, turn.micro
        size = sizes[n] if sizes else 1
        if turn.way != "backward":
            came = ended["forward", s - 1, n] + away if s else 0.0
            free[s] = ended["forward", s, n] = max(free[s], came) + size
        if turn.way != "forward":
            came = ended["backward", s + 1, n] + away if s < stages - 1 else 0.0
            free[s] = ended["backward", s, n] = max(free[s], came) + 2 * size
    return max(free)


# Nanoseconds a token in a layer and in the head, by README's rates on an H100 and 0.5B's layer of 1.6 ms.
MEASURED = {"0.5b": (174, 1150), "7b": (1700, 3400)}


@pytest.mark.parametrize("model", MEASURED)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_layers_are_cut_so_that_the_slowest_stage_has_least_to_do(model, stages):
    """Against every cut, by the time that layers and head take: at most a tenth of a layer worse than the best."""
    layers, (layer, head), found = SHAPES[model].layers, MEASURED[model], cut(SHAPES[model], stages)
    assert sum(found) == layers and min(found) >= 1 and len(found) == stages
    best = min(max(-(-(layers - last) // (stages - 1)) * layer, last * layer + head) for last in range(1, layers))
    assert max(max(found[:-1]) * layer, found[-1] * layer + head) <= best + 0.1 * layer


@pytest.mark.parametrize("layers", [2, 3, 5, 8])
def test_a_model_of_few_layers_has_one_in_every_stage(layers):
    shape = replace(SHAPES["0.5b"], layers=layers)
    for stages in range(1, layers + 1):
        found = cut(shape, stages)
        assert sum(found) == layers and len(found) == stages and min(found) >= 1
