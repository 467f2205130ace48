"""Sequential Wanda against the whole model run again from scratch for every block, in float64."""

import copy

import pytest
import torch
from lrp_models import float64_everywhere, make, sequences
from prunable import bits, module

from lib.base.errors import UserError
from lib.checkpoint.families import FAMILIES
from lib.pruning.linears import linears
from lib.pruning.sequential import _first_inputs, _sums_of_squares, sequential_wanda
from lib.pruning.weights import Blocks, Lowest, WeightPruner

SAMPLES = sequences(9, 14, 9, 3)


def gone(metric: torch.Tensor, rule: Lowest | Blocks) -> torch.Tensor:
    if isinstance(rule, Blocks):
        metric, count = metric.view(-1, rule.of), rule.zeros
    elif rule.scope == "layer":
        metric, count = metric.view(1, -1), metric.numel() // 2
    else:
        count = metric.shape[1] // 2
    return torch.zeros_like(metric, dtype=torch.bool).scatter(
        1, metric.sort(dim=1, stable=True).indices[:, :count], True
    )


def plainly(model: torch.nn.Module, rule: Lowest | Blocks, calibrated_on_dense: bool = False) -> torch.nn.Module:
    """Block after block: all samples through the whole model, the block's inputs laid end to end, its lowest to 0."""
    model = copy.deepcopy(model)
    dense, names = copy.deepcopy(model), list(linears(model, FAMILIES[model.config.model_type]))
    for block in range(model.config.num_hidden_layers):
        inputs: dict[str, list[torch.Tensor]] = {}
        source = dense if calibrated_on_dense else model
        mine = [name for name in names if name.startswith(f"layers.{block}.")]
        for name in mine:
            module(source, name).register_forward_hook(
                lambda m, args, out, n=name, to=inputs: to.setdefault(n, []).append(
                    args[0].reshape(-1, args[0].shape[-1])
                )
            )
        with torch.no_grad():
            for ids in SAMPLES:
                source(input_ids=torch.tensor([ids]))
            for name in mine:
                weight = module(model, name).weight
                metric = weight.abs() * torch.cat(inputs[name]).norm(dim=0)
                weight[gone(metric, rule).view(weight.shape)] = 0
    return model


@pytest.mark.parametrize("rule", [Lowest("row", 0.5), Lowest("layer", 0.5), Blocks(2, 4)], ids=["rows", "layer", "2:4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_every_block_is_calibrated_on_pruned_ones(family, rule, tmp_path):
    with float64_everywhere():
        model = make(family, num_hidden_layers=3).double()
        model.save_pretrained(tmp_path)
        before, seen = bits(model), []
        pruner = WeightPruner(model, FAMILIES[family], tmp_path)
        want, other = plainly(model, rule), plainly(model, rule, calibrated_on_dense=True)
        zeros = sequential_wanda(model, FAMILIES[family], pruner, SAMPLES, rule, lambda at, of: seen.append((at, of)))
        assert bits(model) == bits(want) != bits(other)
    have = linears(model, FAMILIES[family])
    assert zeros == {name: int((linear.weight.part == 0).sum()) for name, linear in have.items()}
    assert sum(zeros.values()) * 2 == sum(linear.weight.part.numel() for linear in have.values())
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    pruner.restore()
    assert bits(model) == before


def test_sums_are_exact_to_float32_in_a_bfloat16_model():
    """Added up in bfloat16 they would stand still after a few hundred samples."""
    model, inputs = make("llama", num_hidden_layers=1).bfloat16(), {}
    with torch.no_grad():
        hidden, more = _first_inputs(model, FAMILIES["llama"], sequences(*[3] * 400))
        found = _sums_of_squares(model.model.layers[0], hidden, more)
        for name in found:
            module(model, f"layers.0.{name}").register_forward_pre_hook(
                lambda m, args, n=name: inputs.setdefault(n, []).append(args[0][0].double())
            )
        for x, (args, kwargs) in zip(hidden, more, strict=True):
            model.model.layers[0](x, *args, **kwargs)
    assert len(found) == 7
    for name, sums in found.items():
        torch.testing.assert_close(sums.double(), torch.cat(inputs[name]).square().sum(0), rtol=1e-5, atol=0)


def test_what_cannot_be_meant_is_told(tmp_path):
    model = make("opt")
    model.save_pretrained(tmp_path)
    pruner = WeightPruner(model, FAMILIES["opt"], tmp_path)
    for samples, rule, says in (
        (SAMPLES, Lowest("global", 0.5), "cannot rank all layers together"),
        ([], Lowest("row", 0.5), "needs samples that hold tokens"),
        ([[1], []], Lowest("row", 0.5), "needs samples that hold tokens"),
        ([[1, 97]], Lowest("row", 0.5), "token 97 is none of the model's 97"),
        (SAMPLES, Blocks(2, 5), "has 32 inputs: 2 of every 5 cannot be pruned"),
    ):
        with pytest.raises(UserError, match=says):
            sequential_wanda(model, FAMILIES["opt"], pruner, samples, rule)
