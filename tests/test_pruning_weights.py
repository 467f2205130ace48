"""Which weights go: against full stable sorts; taken out of models, and read back to the last bit."""

import numpy as np
import pytest
import torch
from prunable import CPU, LOADERS, bits, decoder_bits, module, raw
from tools import tiny_llama, tiny_model

from lib.base.errors import UserError
from lib.checkpoint.families import FAMILIES
from lib.models.load import load_decoder, load_model
from lib.pruning.linears import linears
from lib.pruning.scores import Held, wanda_scores
from lib.pruning.weights import Blocks, Lowest, WeightPruner, count_of, masks_by

LLAMA = FAMILIES["llama"]
SHAPES = {"layers.0.fc1": (12, 24), "layers.0.fc2": (7, 36), "layers.1.fc1": (5, 12)}
RULES = [Lowest(scope, share) for scope in ("row", "layer", "global") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
RULES += [Blocks(2, 4), Blocks(1, 12), Blocks(3, 3), Blocks(0, 4)]


def scores(ties: bool, seed: int) -> list[Held]:
    """Signed, with zeros of both signs among them."""
    rng, found = np.random.default_rng(seed), []
    for name, shape in SHAPES.items():
        values = rng.integers(-2, 3, shape) * 0.5 if ties else rng.standard_normal(shape)
        found.append(Held(name, np.where(values == 0, rng.choice([0.0, -0.0], shape), values).astype(np.float32)))
    return found


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Of each row, by a stable sort of all of it."""
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, np.argsort(values, 1, kind="stable")[:, :count], True, 1)
    return mask


def by_sorting(held: list[Held], rule: Lowest | Blocks) -> list[np.ndarray]:
    arrays = [h.values_JI for h in held]
    if isinstance(rule, Blocks):
        return [lowest(a.reshape(-1, rule.of), rule.zeros).reshape(a.shape) for a in arrays]
    if rule.scope == "row":
        return [lowest(a, int(rule.share * a.shape[1])) for a in arrays]
    if rule.scope == "layer":
        return [lowest(a.reshape(1, -1), int(rule.share * a.size)).reshape(a.shape) for a in arrays]
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    parts = np.split(lowest(flat[None], int(rule.share * len(flat)))[0], np.cumsum([a.size for a in arrays])[:-1])
    return [part.reshape(a.shape) for part, a in zip(parts, arrays, strict=True)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_what_goes_is_what_a_stable_sort_puts_first(rule, ties, monkeypatch):
    monkeypatch.setattr("lib.pruning.weights.CHUNK_VALUES", 50)
    for seed in range(3):
        held = scores(ties, seed)
        found = list(masks_by(held, rule, CPU[0]))
        assert [name for name, _ in found] == list(SHAPES)
        for (name, mask), want in zip(found, by_sorting(held, rule), strict=True):
            np.testing.assert_array_equal(mask.numpy(), want, err_msg=name)


def test_shares_are_counted_as_they_are_written():
    assert [count_of(share, 100) for share in (0.29, 0.3, 0.57, 1 / 3, 1.0)] == [29, 30, 57, 33, 100]
    assert int(0.29 * 100) == 28
    with pytest.raises(UserError, match="it has to lie between 0 and 1"):
        count_of(1.5, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def test_wanda_ranks_by_the_definition(folder):
    """|W| times the norm of all inputs laid end to end, in float64, sorted in each row."""
    model, seen = load_model(str(folder), "float32", "sdpa", CPU), {}
    have = linears(model, LLAMA)
    hooks = [
        module(model, name).register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, []).append(args[0]))
        for name in have
    ]
    with torch.no_grad():
        for seed in range(3):
            model(input_ids=torch.randint(5, 200, (1, 9), generator=torch.Generator().manual_seed(seed)))
    for hook in hooks:
        hook.remove()
    norms = {name: torch.cat([x[0] for x in inputs]).double().norm(dim=0) for name, inputs in seen.items()}
    assert norms.keys() == have.keys() and len(norms) == 21
    wanda = wanda_scores(have, norms)
    rows, layers = (dict(masks_by(wanda, Lowest(scope, 0.5), CPU[0])) for scope in ("row", "layer"))
    whole = dict(masks_by(wanda, Lowest("global", 0.5), CPU[0]))
    every = {name: module(model, name).weight.double().abs() * norm for name, norm in norms.items()}
    for name, metric in every.items():
        order = metric.sort(dim=-1, stable=True).indices[:, : metric.shape[1] // 2]
        assert torch.equal(rows[name], torch.zeros_like(rows[name]).scatter(1, order, True)), name
        assert int(layers[name].sum()) == metric.numel() // 2
        assert metric[layers[name]].max() < metric[~layers[name]].min()
    gone, left = (torch.cat([m[pick(whole[n])] for n, m in every.items()]) for pick in (lambda x: x, torch.logical_not))
    assert gone.max() < left.min() and len(gone) == (len(gone) + len(left)) // 2


def random_masks(model) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(n, torch.rand(x.weight.part.shape, generator=generator) < 0.5) for n, x in linears(model, LLAMA).items()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the folder holds float32
def test_models_lose_what_the_mask_says_and_get_it_back(folder, tmp_path, dtype):
    model, decoder = (load(str(folder), dtype, *more) for load, more in LOADERS)
    chosen, before, decoder_before = random_masks(model), bits(model), decoder_bits(decoder)
    with WeightPruner(model, LLAMA, folder).applied(chosen) as zeros:
        for name, mask in chosen:
            weight = module(model, name).weight
            dense = torch.frombuffer(bytearray(before[f"model.{name}.weight"]), dtype=weight.dtype).view_as(weight)
            assert raw(weight) == raw(torch.where(mask, torch.zeros((), dtype=weight.dtype), dense))
        assert zeros == {name: int(mask.sum()) for name, mask in chosen}
        model.save_pretrained(tmp_path)
    want = decoder_bits(load_decoder(str(tmp_path), dtype, 64, 16))
    with WeightPruner(decoder.weights, LLAMA, folder).applied(chosen):
        assert decoder_bits(decoder) == want != decoder_before
    assert bits(model) == before and decoder_bits(decoder) == decoder_before


def test_an_error_on_the_way_brings_everything_back(folder):
    model = load_model(str(folder), "float32", "sdpa", CPU)
    before, chosen = bits(model), random_masks(model)
    wrong = [*chosen[:3], ("layers.0.mlp.up_proj", torch.zeros(3, 3, dtype=torch.bool))]
    with (
        pytest.raises(UserError, match=r"up_proj is \(80, 48\), its scores are \(3, 3\)"),
        WeightPruner(model, LLAMA, folder).applied(wrong),
    ):
        pass
    assert bits(model) == before


def test_what_cannot_be_meant_is_told(folder, tmp_path):
    model = load_model(str(folder), "float32", "sdpa", CPU)
    bad = Held("layers.0.fc1", np.array([[1.0, np.nan, 2.0, 3.0]], np.float32))
    wide, have = Held("layers.0.fc1", np.zeros((2, 6), np.float32)), linears(model, LLAMA)
    for call, says in (
        (lambda: list(masks_by([wide], Blocks(2, 4), CPU[0])), "has 6 inputs: 2 of every 4 cannot"),
        (lambda: list(masks_by([bad], Blocks(5, 4), CPU[0])), "4 inputs: 5 of every 4 cannot"),
        (lambda: list(masks_by([bad], Lowest("row", 0.5), CPU[0])), r"layers\.0\.fc1 hold NaN"),
        (lambda: list(masks_by([bad], Blocks(2, 4), CPU[0])), r"layers\.0\.fc1 hold NaN"),
        (lambda: list(masks_by([bad], Lowest("layer", 0.5), CPU[0])), r"layers\.0\.fc1 hold NaN"),
        (lambda: wanda_scores(have, {"layers.0.mlp.up_proj": torch.ones(5)}), "48 inputs and 5 norms"),
        (lambda: wanda_scores(have, {"layers.0.mlp.up": torch.ones(5)}), r"no linear layer .* \(did you mean"),
        (lambda: WeightPruner(model, LLAMA, tiny_model(tmp_path)), "it is not what the model was loaded from"),
    ):
        with pytest.raises(UserError, match=says):
            call()
