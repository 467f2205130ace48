"""What a student's training is made of, each against an independent computation: the order of rows, the rate, rows by
the chat template, the plain trainer in float64, and adapters that peft loads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from tools import tiny_llama, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from lib.base.errors import UserError
from lib.inputs.records import ModelSizes
from lib.lora.chat_rows import as_rows
from lib.lora.kernel import must_suit
from lib.lora.peft_form import config_of, load_adapter, save_adapter, targets_in
from lib.lora.plain import PlainTrainer
from lib.lora.recipe import Lora
from lib.lora.rows import Row
from lib.lora.schedule import Schedule
from lib.models.chat import Renderer

CPU = torch.device("cpu")
HOW = Schedule(rows=100, step_rows=12, epochs=3, learning_rate=3e-4, warmup=5, seed=7)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("llama")))


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own():
    assert HOW.steps_an_epoch == 9 and HOW.steps == 27
    epochs = [[row for step in range(9 * e + 1, 9 * e + 10) for row in HOW.rows_of(step)] for e in range(3)]
    assert all(sorted(rows) == list(range(100)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3, "another order each time"
    assert [len(HOW.rows_of(step)) for step in (1, 8, 9, 10, 18)] == [12, 12, 4, 12, 4]
    assert [HOW.epoch_of(step) for step in (1, 9, 10, 27)] == [1, 1, 2, 3]
    assert replace(HOW, seed=8).rows_of(1) != HOW.rows_of(1)


@pytest.mark.parametrize("how", [HOW, replace(HOW, warmup=0), replace(HOW, epochs=1, rows=40)], ids=str)
def test_the_rate_is_that_of_transformers_linear_schedule(how):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=how.learning_rate)
    theirs = get_linear_schedule_with_warmup(optimizer, how.warmup, how.steps)
    for step in range(1, how.steps + 1):
        assert how.rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        theirs.step()


PROMPTS = ["Continue: 123, 456.", "Here are numbers 7; 8"]
ANSWERS = ["12, 34, 56", "[9; 10; 999]"]


@pytest.mark.parametrize("mode", ["default", "empty", "none"])
def test_a_row_is_the_whole_conversation_by_transformers_own_template(qwen, mode):
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    renderer = Renderer(tokenizer, None, mode, "2024-07-26")
    rows = as_rows(renderer, PROMPTS, ANSWERS, "completion", 500)
    for row, prompt, answer in zip(rows, PROMPTS, ANSWERS, strict=True):
        front = [{"role": "system", "content": ""}] if mode == "empty" else []
        turns = [*front, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        text = text[text.index("<|im_start|>user") :] if mode == "none" else text
        assert row.ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert tokenizer.decode(row.ids[row.first :]) == f"{answer}<|im_end|>\n"
    assert as_rows(renderer, PROMPTS, ANSWERS, "sequence", 500) == [replace(row, first=1) for row in rows]


def test_what_is_too_long_is_cut_and_a_question_without_room_for_its_answer_is_said(qwen):
    renderer = Renderer(AutoTokenizer.from_pretrained(qwen), None, "default", "2024-07-26")
    [whole, _] = as_rows(renderer, PROMPTS, ANSWERS, "completion", 500)
    cut = as_rows(renderer, PROMPTS[:1], ANSWERS[:1], "completion", whole.first + 2)
    assert cut == [Row(whole.ids[: whole.first + 2], whole.first)]
    with pytest.raises(UserError, match="raise max_length"):
        as_rows(renderer, PROMPTS, ANSWERS, "sequence", whole.first)


def test_rows_that_the_model_does_not_know_are_said_before_it_is_loaded():
    must_suit([Row((0, 9), 1)], ModelSizes(vocab_size=10, max_position_embeddings=2))
    must_suit([Row((0, 9), 1)], ModelSizes())
    with pytest.raises(UserError, match="token 10 is none of the model's 10"):
        must_suit([Row((0, 10), 1)], ModelSizes(vocab_size=10))
    with pytest.raises(UserError, match="lower max_length"):
        must_suit([Row((0, 1, 2), 1)], ModelSizes(max_position_embeddings=2))


def random_rows(count: int, vocabulary: int = 250, seed: int = 0) -> list[Row]:
    dice = np.random.default_rng(seed)
    lengths = dice.integers(4, 30, count)
    return [Row(tuple(dice.integers(3, vocabulary, n).tolist()), int(dice.integers(1, n))) for n in lengths]


class ByHand:
    """A model with low-rank terms written out, row after row without padding; Adam and the clip by their formulas."""

    def __init__(self, folder: str, lora: Lora, start: dict[str, torch.Tensor]) -> None:
        self.lora, self.m, self.v = lora, {}, {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
        names = [name for name in start if not name.startswith("adam")]
        self.weights = {name: start[name].clone().requires_grad_() for name in names}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.register_forward_hook(self._more(f"base_model.model.{name}"))

    def _more(self, name):
        def hook(module, inputs, output):
            a, b = (self.weights[f"{name}.lora_{matrix}.weight"] for matrix in "AB")
            return output + self.lora.alpha / self.lora.rank**0.5 * ((inputs[0] @ a.T) @ b.T)

        return hook

    def step(self, rows: list[Row], rate: float, t: int) -> tuple[float, float]:
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            log_probs = self.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            for position in range(row.first, len(row.ids)):
                total = total - log_probs[position - 1, row.ids[position]]
        loss = total / sum(len(row.ids) - row.first for row in rows)
        grads = torch.autograd.grad(loss, list(self.weights.values()))
        norm = sum((g**2).sum() for g in grads) ** 0.5
        shrink = min(1.0, self.lora.clip / (norm.item() + 1e-6))
        (b1, b2), eps = self.lora.betas, self.lora.eps
        with torch.no_grad():
            for (name, w), g in zip(self.weights.items(), grads, strict=True):
                g = g * shrink
                self.m[name] = b1 * self.m.get(name, 0) + (1 - b1) * g
                self.v[name] = b2 * self.v.get(name, 0) + (1 - b2) * g**2
                m, v = self.m[name] / (1 - b1**t), self.v[name] / (1 - b2**t)
                w -= rate * (m / (v.sqrt() + eps) + self.lora.weight_decay * w)
        return loss.item(), norm.item()


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_the_plain_trainer_is_a_loop_written_by_hand_in_float64(family, request):
    folder = request.getfixturevalue(family)
    lora = Lora(rank=3, alpha=6, rslora=True, clip=0.4, weight_decay=0.01, betas=(0.8, 0.95))
    trainer = PlainTrainer(folder, lora, "float64", CPU, micro_rows=2)
    trainer.begin(11)
    hand = ByHand(folder, lora, trainer.state())
    assert len(hand.weights) == 2 * 7 * len(hand.model.model.layers), "seven projections"
    for t in range(1, 9):
        rows, rate = random_rows(5, seed=t), 0.0 if t == 1 else 1e-2 / t
        said = trainer.step(rows, rate, t)
        loss, norm = hand.step(rows, rate, t)
        assert said["loss"] == pytest.approx(loss, rel=1e-12) and said["grad_norm"] == pytest.approx(norm, rel=1e-9)
        assert said["tokens"] == sum(len(row.ids) for row in rows) and said["scored"] == sum(r.scored for r in rows)
    state = trainer.state()
    for name, weight in hand.weights.items():
        assert (state[name] - weight).abs().max() < 1e-10 * max(1, weight.abs().max()), name
        assert weight.abs().max() > 1e-3
        for moment, value in (("adam.m.", hand.m[name]), ("adam.v.", hand.v[name])):
            torch.testing.assert_close(state[moment + name], value, rtol=1e-8, atol=1e-14)


def test_micro_batches_and_padding_change_no_step(qwen):
    rows, states = random_rows(7), []
    for micro in (1, 3, 7):
        trainer = PlainTrainer(qwen, Lora(), "float64", CPU, micro)
        for t in (1, 2, 3):
            trainer.step(rows, 1e-2, t)
        states.append(trainer.state())
    for name, tensor in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-13)


def test_an_adapter_begins_as_pefts_by_the_seed_alone(qwen):
    trainer = PlainTrainer(qwen, Lora(), "float32", CPU)
    torch.manual_seed(1)
    trainer.begin(3)
    first = trainer.state()
    trainer.step(random_rows(4), 1e-2, 1)
    torch.manual_seed(2)
    trainer.begin(3)
    again = trainer.state()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    trainer.begin(4)
    for name, a in first.items():
        if name.endswith("lora_A.weight") and not name.startswith("adam"):
            bound = a.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
            assert a.dtype == torch.float32 and 0.9 * bound < a.abs().max() <= bound
            assert abs(a.std().item() / (bound / 3**0.5) - 1) < 0.15 and not torch.equal(a, trainer.state()[name])
        else:
            assert not a.any(), name
    layers = [first[name] for name in first if name.endswith("q_proj.lora_A.weight") and "adam" not in name]
    assert not torch.equal(*layers), "no two layers are alike"


def test_a_state_is_all_that_a_training_goes_on_from_with_dropout_too(qwen, tmp_path):
    lora, rows = Lora(dropout=0.3), random_rows(6)
    straight = PlainTrainer(qwen, lora, "float32", CPU)
    straight.begin(5)
    losses = [straight.step(rows, 1e-2, t)["loss"] for t in range(1, 7)]
    other = PlainTrainer(qwen, lora, "float32", CPU)
    other.begin(5)
    for t in (1, 2, 3):
        other.step(rows, 1e-2, t)
    save_adapter(tmp_path, other.state(), config_of(lora, targets_in(qwen), qwen, "main"))
    del other
    third = PlainTrainer(qwen, lora, "float32", CPU)
    third.begin(5)
    third.load(load_adapter(tmp_path))
    torch.rand(100)
    assert [third.step(rows, 1e-2, t)["loss"] for t in (4, 5, 6)] == losses[3:]
    assert all(torch.equal(tensor, third.state()[name]) for name, tensor in straight.state().items())
    none = PlainTrainer(qwen, Lora(), "float32", CPU)
    none.begin(5)
    without = [none.step(rows, 1e-2, t)["loss"] for t in range(1, 7)]
    assert without[0] == losses[0] and without[5] != losses[5], "it begins with B = 0, and then something is dropped"


def test_the_files_are_pefts_own_and_give_the_same_log_probs(llama, tmp_path):
    lora = Lora(rank=5, alpha=2.5, rslora=True)
    trainer = PlainTrainer(llama, lora, "float32", CPU)
    for t in range(1, 6):
        trainer.step(random_rows(6), 3e-2, t)
    save_adapter(tmp_path, trainer.state(), config_of(lora, targets_in(llama), "some/base", "main"))
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.tensor([random_rows(1, seed=9)[0].ids])
    plain = base(ids).logits.log_softmax(-1)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        theirs, ours = (model(ids).logits.log_softmax(-1) for model in (loaded, trainer.model))
    assert torch.equal(theirs, ours) and (theirs - plain).abs().max() > 0.1
    config = PeftConfig.from_pretrained(str(tmp_path))
    wanted = LoraConfig(r=5, lora_alpha=2.5, use_rslora=True, task_type="CAUSAL_LM", inference_mode=True)
    wanted.target_modules, wanted.base_model_name_or_path = config.target_modules, "some/base"
    wanted.revision, wanted.peft_version = "main", config.peft_version
    assert config.to_dict() == wanted.to_dict()
    assert set(config.target_modules) == {f"{one}_proj" for one in ("q", "k", "v", "o", "gate", "up", "down")}


def test_bfloat16_products_under_float32_adapters(qwen):
    exact = PlainTrainer(qwen, Lora(), "float64", CPU)
    mixed = PlainTrainer(qwen, Lora(), "bfloat16", CPU)
    assert {p.dtype for p in mixed.parameters.values()} == {torch.float32}
    assert {p.dtype for p in mixed.model.base_model.model.model.layers.parameters()} == {torch.float32, torch.bfloat16}
    for t in range(1, 12):
        rows = random_rows(6, seed=t)
        a, b = exact.step(rows, 1e-2, t)["loss"], mixed.step(rows, 1e-2, t)["loss"]
        assert a != b and abs(a - b) < 0.05
    assert all(tensor.dtype == torch.float32 for tensor in mixed.state().values())
