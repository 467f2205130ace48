"""The scoped patch: its gradients are LRP's, by lxt and by hand."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from lrp_models import FAMILIES, by_hand, float64_everywhere, make, prune, sequences
from tools import ROOT
from transformers import PreTrainedModel

from lib.attribution.patch import RULES, patched

LRP = ("attnlrp", "cp_lrp")
IDS = sequences(12)[0]
TARGETS = [(11, 40), (4, 7)]  # (position, token)


@pytest.fixture
def all_float64() -> Iterator[None]:
    with float64_everywhere():
        yield


def logits(model: PreTrainedModel, ids: list[int], **kw: object) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False, **kw).logits[0]


def collect(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients of all weights, 0 where none arrived; cleared."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def gradients(model: PreTrainedModel, rule: str | None = None, ids: list[int] = IDS, **kw: bool) -> dict:
    """Of the sum of TARGETS' logits by all parameters; under a rule in its scope, else in none."""
    if rule is not None:
        with patched(model, rule, **kw):
            return gradients(model, ids=ids)
    model.zero_grad(set_to_none=True)
    out = logits(model, ids)
    sum(out[position, token] for position, token in TARGETS).backward()
    return collect(model)


def linears(model: PreTrainedModel) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def worst(ours: dict, reference: Callable[[str], np.ndarray], names: list[str]) -> float:
    """The largest error in a matrix relative to its largest value; a matrix of zeros must be zero."""
    errors = []
    for name in names:
        expected = reference(name)
        error, size = np.abs(ours[f"{name}.weight"].numpy() - expected).max(), np.abs(expected).max()
        errors.append(error / size if size else np.inf * error if error else 0.0)
    return max(errors)


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Against lxt

CASES = {
    f"{family}-{attention}": {"family": family} for family in (*FAMILIES, "qwen3") for attention in ("sdpa", "eager")
}
CASES["llama-gelu-sdpa"] = {"family": "llama", "changes": {"hidden_act": "gelu_pytorch_tanh"}}
CASES["llama-biased-sdpa"] = {"family": "llama", "changes": {"attention_bias": True, "mlp_bias": True}}
CASES["llama-wide-heads-sdpa"] = {"family": "llama", "changes": {"head_dim": 16}}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
CASES["qwen2-window-sdpa"] = {"family": "qwen2", "changes": WINDOW}
CASES["opt-norm-after-sdpa"] = {"family": "opt", "changes": {"do_layer_norm_before": False, "word_embed_proj_dim": 16}}


def case_model(case: str) -> PreTrainedModel:
    spec = CASES[case]
    return make(spec["family"], attention=case.rpartition("-")[2], **spec.get("changes", {}))


@pytest.fixture(scope="module")
def lxt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """What lxt finds for all cases, by rule; one process, for it patches whole classes."""
    folder, request = tmp_path_factory.mktemp("lxt"), {}
    for case, spec in CASES.items():
        case_model(case).save_pretrained(folder / case)
        request[case] = {
            "folder": str(folder / case),
            "family": spec["family"],
            "attention": case.rpartition("-")[2],
            "ids": [IDS],
            "targets": [[0, position, token] for position, token in TARGETS],
        }
    (folder / "cases.json").write_text(json.dumps(request))
    command = [sys.executable, ROOT / "tests/lxt_reference.py", folder, *LRP]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {rule: dict(np.load(folder / f"{rule}.npz")) for rule in LRP}


@pytest.mark.parametrize("rule", LRP)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_lxts(lxt: dict, case: str, rule: str) -> None:
    model = case_model(case)
    ours = gradients(model, rule)
    plain = gradients(model)
    assert worst(ours, lambda name: lxt[rule][f"{case}/{name}"], linears(model)) < 1e-5
    assert worst(plain, lambda name: lxt[rule][f"{case}/{name}"], linears(model)) > 0.1


# Against the rules written out by hand


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_by_hand(all_float64: None, family: str, rule: str) -> None:
    model = make(family, num_hidden_layers=3, attention="eager").double()
    hand = by_hand(model, IDS, TARGETS, rule)
    ours = gradients(model, rule)
    assert worst(ours, hand.gradient, linears(model)) < 1e-9
    with patched(model, rule):
        np.testing.assert_allclose(logits(model, IDS).detach().numpy(), hand.logits, rtol=1e-9)


@pytest.mark.parametrize("rule", LRP)
def test_a_gate_of_exactly_zero_passes_half(all_float64: None, rule: str) -> None:
    """A pruned neuron's gate is 0, where silu(x)/x has the limit 1/2."""
    model = make("llama").double()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[:20] = 0
        model.model.layers[1].mlp.up_proj.weight[:20] = 0
    ours = gradients(model, rule)
    assert worst(ours, by_hand(model, IDS, TARGETS, rule).gradient, linears(model)) < 1e-9


# What LRP promises


def conserved(model: PreTrainedModel, rule: str) -> tuple[float, np.ndarray]:
    """Relevance of all embeddings over the explained logit, and by token."""
    first = model.get_input_embeddings()(torch.tensor([IDS])).detach().requires_grad_()
    with patched(model, rule):
        logit = model(inputs_embeds=first, use_cache=False).logits[0, -1].max()
        logit.backward()
    relevance = (first * first.grad).sum(-1)[0].detach().numpy()
    return relevance.sum() / logit.item(), relevance


@pytest.mark.parametrize(
    ("family", "changes"), [*((f, {}) for f in FAMILIES), ("opt", {"activation_function": "gelu"})], ids=str
)
def test_cp_lrp_conserves_relevance(all_float64: None, family: str, changes: dict) -> None:
    """What goes in at the logit arrives at the embeddings, to the last digit, if no bias or position takes a share."""
    model = make(family, **changes).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "embed_positions" in name:
                parameter.zero_()
    ratio, _ = conserved(model, "cp_lrp")
    assert ratio == pytest.approx(1, abs=1e-10)
    untouched, _ = conserved(model, "gradient")
    assert abs(untouched - 1) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_attnlrp_relevance_of_embeddings(all_float64: None, family: str) -> None:
    """As by hand; what goes through the softmax is not conserved (a Taylor expansion), so the sum is only near 1."""
    model = make(family).double()
    ratio, relevance = conserved(model, "attnlrp")
    token = int(logits(model, IDS)[-1].argmax())
    np.testing.assert_allclose(relevance, by_hand(model, IDS, [(len(IDS) - 1, token)], "attnlrp").embedding, rtol=1e-9)
    assert 0.2 < ratio < 1.2


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_of_rows_and_columns(all_float64: None, family: str) -> None:
    """Weights and bias of a neuron hold what it hands on: up = gate = half of down's column; q in all = k in all."""
    model = make(family).double()
    grad = gradients(model, "attnlrp")
    state = model.state_dict()
    with_bias = {}
    for name in linears(model):
        with_bias[name] = (state[f"{name}.weight"] * grad[f"{name}.weight"]).sum(1)
        if f"{name}.bias" in state:
            with_bias[name] += state[f"{name}.bias"] * grad[f"{name}.bias"]
    layers = [n.removesuffix(".self_attn.q_proj") for n in linears(model) if n.endswith("q_proj")]
    assert len(layers) == 2
    close = {"rtol": 1e-9, "atol": 1e-12}
    for layer in layers:
        q, k = with_bias[f"{layer}.self_attn.q_proj"].sum(), with_bias[f"{layer}.self_attn.k_proj"].sum()
        assert abs(q) > 1e-4
        torch.testing.assert_close(q, k, **close)
        last = "fc2" if family == "opt" else "mlp.down_proj"
        column = (state[f"{layer}.{last}.weight"] * grad[f"{layer}.{last}.weight"]).sum(0)
        if family == "opt":
            torch.testing.assert_close(with_bias[f"{layer}.fc1"], column, **close)
        else:
            torch.testing.assert_close(with_bias[f"{layer}.mlp.up_proj"], column / 2, **close)
            torch.testing.assert_close(with_bias[f"{layer}.mlp.gate_proj"], column / 2, **close)


# Modes


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit(family: str) -> None:
    model = make(family)
    for rule in LRP:
        expected = gradients(model, rule)
        assert same_bits(gradients(model, rule, recompute=True), expected)
        for reentrant in (False, True):
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert same_bits(gradients(model, rule), expected)
            assert same_bits(gradients(model, rule, recompute=True), expected)
            model.gradient_checkpointing_disable()
            model.eval()


@pytest.mark.parametrize(
    "family,dropouts",
    [
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("qwen2", {"attention_dropout": 0.5}),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_is_off_in_the_scope(family: str, dropouts: dict, attention: str) -> None:
    model = make(family, attention, **dropouts)
    expected = gradients(model, "attnlrp")
    torch.manual_seed(0)
    model.train()
    assert not same_bits(gradients(model), gradients(model))  # it is on outside
    assert same_bits(gradients(model, "attnlrp"), expected)
    assert same_bits(gradients(model, "attnlrp", recompute=True), expected)
    assert not same_bits(gradients(model), gradients(model))


@pytest.mark.parametrize("rule", LRP)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, side: str, rule: str) -> None:
    """A padded batch's gradients are the sum of its samples' own."""
    model = make(family)
    rows = sequences(5, 12, 9)
    width = max(map(len, rows))
    shift = [width - len(row) if side == "left" else 0 for row in rows]
    batch, mask, position = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        real = slice(shift[i], shift[i] + len(row))
        batch[i, real], mask[i, real], position[i, real] = torch.tensor(row), 1, torch.arange(len(row))
    with patched(model, rule):
        out = model(input_ids=batch, attention_mask=mask, position_ids=position, use_cache=False).logits
        sum(out[i, shift[i] + len(row) - 1, 7] for i, row in enumerate(rows)).backward()
        together = collect(model)
        for row in rows:
            logits(model, row)[-1, 7].backward()
        alone = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert worst(together, lambda name: alone[f"{name}.weight"].numpy(), linears(model)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_with_pruned_neurons(family: str, dtype: torch.dtype) -> None:
    """Target pinned, relevance of weights in half precision goes with float32's; a gate of exactly 0 gives no NaN."""
    model = make(family)
    prune(model)
    wide = gradients(model, "attnlrp")
    half = gradients(model.to(dtype), "attnlrp")
    for name in linears(model):
        a, b = wide[f"{name}.weight"].flatten(), half[f"{name}.weight"].float().flatten()
        assert b.isfinite().all(), name
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.99, name
