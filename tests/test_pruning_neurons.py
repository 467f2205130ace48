"""Neurons of loaded models: the function of a model without them, and back to the last bit, in counted launches."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from lrp_models import float64_everywhere, make, sequences
from prunable import LOADERS, bits, decoder_bits, module
from tools import tiny_llama, tiny_model, tiny_relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib.base.errors import UserError
from lib.checkpoint.families import FAMILIES
from lib.models.load import load_decoder
from lib.models.packing import Item, pack
from lib.pruning.linears import linears
from lib.pruning.neurons import Pruner

IDS = torch.tensor(sequences(11, 11))


def inner(model: nn.Module) -> list[tuple[str, str]]:
    """Layers whose outputs are the MLP's neurons, and the one that reads them, of each layer."""
    up, down = ("fc1", "fc2") if model.config.model_type == "opt" else ("mlp.up_proj", "mlp.down_proj")
    return [(f"layers.{i}.{up}", f"layers.{i}.{down}") for i in range(model.config.num_hidden_layers)]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), float64_everywhere():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_an_mlps_neurons_are_as_if_they_had_never_been(family):
    model = make(family).double()
    chosen = {up: [1, 5, 30 + number] for number, (up, _) in enumerate(inner(model))}
    small = copy.deepcopy(model)
    for up, down in inner(small):
        names = [up] if family == "opt" else [up, up.replace("up_proj", "gate_proj")]
        left = [i for i in range(module(small, up).out_features) if i not in chosen[up]]
        for name in names:
            layer = module(small, name)
            layer.weight = nn.Parameter(layer.weight[left])
            layer.bias = None if layer.bias is None else nn.Parameter(layer.bias[left])
        module(small, down).weight = nn.Parameter(module(small, down).weight[:, left])
    before, dense = bits(model), logits(model)
    with Pruner(model, FAMILIES[family]).applied(chosen):
        torch.testing.assert_close(logits(model), logits(small), rtol=1e-11, atol=1e-11)
        assert (logits(model) - dense).abs().max() > 1e-3
    assert bits(model) == before


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "v_proj", "o", "down"])
def test_any_other_layers_neuron_is_its_output(family, kind):
    model = make(family).double()
    named = {"o": FAMILIES[family].linears.o, "down": FAMILIES[family].linears.down}
    name = f"layers.1.{named.get(kind, f'self_attn.{kind}')}"

    def silence(layer, args, out):
        factors = torch.ones_like(out)
        factors[..., [3, 7]] = 0
        return out * factors

    before = bits(model)
    hook = module(model, name).register_forward_hook(silence)
    want = logits(model)
    hook.remove()
    with Pruner(model, FAMILIES[family]).applied({name: np.array([7, 3, 7])}):
        torch.testing.assert_close(logits(model), want, rtol=1e-12, atol=1e-12)
    assert bits(model) == before


def test_up_and_gate_name_the_same_neurons():
    model, family = make("llama"), FAMILIES["llama"]
    pruner, found = Pruner(model, family), []
    for chosen in ({"up_proj": [2, 9]}, {"gate_proj": [9, 2]}, {"up_proj": [2], "gate_proj": [9, 2]}):
        plan = pruner.prepare({f"layers.0.mlp.{name}": indices for name, indices in chosen.items()})
        assert plan.neurons == 2
        with pruner.applied(plan):
            found.append(bits(model))
    assert found[0] == found[1] == found[2]
    mlp = model.model.layers[0].mlp
    with pruner.applied({"layers.0.mlp.gate_proj": [2]}):
        assert not mlp.up_proj.weight[2].any() and not mlp.gate_proj.weight[2].any()
        assert not mlp.down_proj.weight[:, 2].any()


def test_rows_and_columns_that_cross_come_back_with_whatever_they_held():
    """fc2's neuron 4 and fc1's neuron 6 share a weight; some hold what no arithmetic would give back."""
    model = make("opt").bfloat16()
    fc1, fc2 = (module(model, f"layers.0.{name}") for name in ("fc1", "fc2"))
    with torch.no_grad():
        fc2.weight[4, 6] = -0.0
        fc1.weight[6, :3] = torch.tensor([float("nan"), float("inf"), 1e-40]).bfloat16()
        fc1.bias[6] = torch.tensor([0x7FA1], dtype=torch.int16).view(torch.bfloat16)[0]  # a NaN with a payload
    before = bits(model)
    with Pruner(model, FAMILIES["opt"]).applied({"layers.0.fc1": [6], "layers.0.fc2": [4]}):
        assert not fc1.weight[6].any() and fc1.bias[6] == 0 and fc2.bias[4] == 0
        assert not fc2.weight[4].any() and not fc2.weight[:, 6].any()
    assert bits(model) == before


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"llama": tiny_llama(root / "llama"), "qwen2": tiny_model(root / "qwen2")}
    return made | {"qwen3": tiny_relative(root / "qwen3", "Qwen3", head_dim=8)}


def everywhere(family: str, model: nn.Module) -> dict[str, list[int]]:
    """Some neurons of every linear layer."""
    names = linears(model, FAMILIES[family])
    return {name: [i % linear.weight.count, linear.weight.count - 1] for i, (name, linear) in enumerate(names.items())}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_decoders_merged_weights_become_those_of_the_pruned_model(family, folders, tmp_path):
    model, decoder = (load(str(folders[family]), "float32", *more) for load, more in LOADERS)
    some = everywhere(family, model)
    assert linears(decoder.weights, FAMILIES[family]).keys() == some.keys()
    for name, linear in linears(decoder.weights, FAMILIES[family]).items():
        assert torch.equal(linear.weight.part, module(model, name).weight)
    before = decoder_bits(decoder)
    with Pruner(model, FAMILIES[family]).applied(some):
        model.save_pretrained(tmp_path)
        want = decoder_bits(load_decoder(str(tmp_path), "float32", 64, 16))
    with Pruner(decoder.weights, FAMILIES[family]).applied(some):
        assert decoder_bits(decoder) == want != before
    assert decoder_bits(decoder) == before


def test_a_model_of_views_is_pruned_with_the_decoder(folders):
    """One copy of the weights under both: pruning either is seen by the other."""
    family, ids = FAMILIES["qwen2"], list(range(5, 27))
    model, decoder = (load(str(folders["qwen2"]), "float32", *more) for load, more in LOADERS)
    for name, linear in linears(decoder.weights, family).items():
        module(model, name).weight.data = linear.weight.part
        if linear.bias:
            module(model, name).bias.data = linear.bias.part

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        (batch,) = pack([Item((ids[0],), tuple(ids[1:]))], 0, 64)
        ours = decoder.log_probs(decoder.hidden(batch, decoder.prefix([])), batch.targets, 16)
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return ours, theirs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    dense = both()[0]
    for one in (model, decoder.weights):
        with Pruner(one, family).applied(
            {"layers.0.mlp.up_proj": range(0, 60, 2), "layers.1.self_attn.v_proj": [0, 5]}
        ):
            ours, theirs = both()
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert (ours - dense).abs().max() > 0.05
        assert torch.equal(both()[0], dense)


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_launches_are_two_a_tensor_and_none_waits(folders):
    """However many neurons: of a layer up, gate and down; of the decoder gate_up and down."""
    model, decoder = (load(str(folders["llama"]), "float32", *more) for load, more in LOADERS)
    for one, tensors in ((model, 3), (decoder.weights, 2)):
        pruner = Pruner(one, FAMILIES["llama"])
        plan = pruner.prepare({f"layers.{i}.mlp.up_proj": range(40) for i in range(3)})
        assert plan.neurons == 120
        with Counted() as counted:
            pruner.apply(plan)
        assert counted.seen == {"index_select": 3 * tensors, "index_fill_": 3 * tensors}
        with Counted() as counted:
            pruner.undo()
        assert counted.seen == {"index_copy_": 3 * tensors}


def test_nothing_nests_and_an_error_inside_undoes():
    model = make("opt")
    pruner, before = Pruner(model, FAMILIES["opt"]), bits(model)
    with pytest.raises(ZeroDivisionError), pruner.applied({"layers.0.fc1": [1]}):
        with pytest.raises(RuntimeError, match="applied already"):
            pruner.apply({"layers.1.fc1": [1]})
        raise ZeroDivisionError
    assert bits(model) == before
    with pytest.raises(RuntimeError, match="nothing to undo"):
        pruner.undo()
    with pruner.applied({}):
        assert bits(model) == before


def test_neurons_that_are_not_there_are_named():
    pruner = Pruner(make("llama"), FAMILIES["llama"])
    for chosen, says in (
        ({"layers.0.mlp.up_proj": [48]}, r"layers\.0\.mlp\.up_proj has no neuron 48: it has 48, from 0"),
        ({"layers.0.self_attn.k_proj": [-1]}, "has no neuron -1: it has 16"),
        ({"layers.7.mlp.up_proj": [0]}, r"no linear layer layers\.7\.mlp\.up_proj \(did you mean"),
        ({"layers.0.mlp.up_proj": [0.5]}, "a list of whole numbers is meant"),
        ({"layers.0.mlp.up_proj": [[1]]}, "a list of whole numbers is meant"),
    ):
        with pytest.raises(UserError, match=says):
            pruner.apply(chosen)
