"""Wanda's norms and scores against stored inputs laid end to end, in float64."""

import numpy as np
import pytest
import torch

from lib.attribution import wanda
from lib.attribution.wanda import neuron_scores, norms, weight_scores

INPUTS, OUTPUTS = 12, 30


def samples(count: int, seed: int = 0) -> list[np.ndarray]:
    """Inputs of a layer, a sample after another, of ragged lengths."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 2, INPUTS)
    return [rng.standard_normal((rng.integers(1, 40), INPUTS)) * scale for _ in range(count)]


def sumsq(inputs: list[np.ndarray]) -> torch.Tensor:
    """As it is gathered: in float32, token after token."""
    total = torch.zeros(INPUTS)
    for x in inputs:
        for token in torch.from_numpy(x).float():
            total += token.square()
    return total


def norm_of(inputs: list[np.ndarray], kind: str) -> torch.Tensor:
    return norms(sumsq(inputs), sum(map(len, inputs)), len(inputs), kind)


def test_the_norm_is_that_of_all_tokens_end_to_end():
    inputs = samples(9)
    want = np.linalg.norm(np.concatenate(inputs), axis=0)
    np.testing.assert_allclose(norm_of(inputs, "tokens"), want, rtol=1e-5)


def test_the_official_norm_is_its_running_mean():
    """scaler_row *= n / (n + 1); scaler_row += ||x||^2 / (n + 1), a sample after another."""
    inputs, running = samples(7), np.zeros(INPUTS)
    for n, x in enumerate(inputs):
        running *= n / (n + 1)
        running += np.linalg.norm(x, axis=0) ** 2 / (n + 1)
    np.testing.assert_allclose(norm_of(inputs, "sample_mean"), np.sqrt(running), rtol=1e-5)


def test_rms_is_per_token():
    inputs = samples(7)
    want = np.sqrt(np.mean(np.concatenate(inputs) ** 2, axis=0))
    np.testing.assert_allclose(norm_of(inputs, "rms"), want, rtol=1e-5)


@pytest.mark.parametrize("copies", [2, 9, 16])
def test_copies_of_a_sample_make_only_the_concatenated_norm_grow(copies):
    once, often = samples(1), samples(1) * copies
    np.testing.assert_allclose(norm_of(often, "tokens"), copies**0.5 * norm_of(once, "tokens"), rtol=1e-5)
    for kind in ("sample_mean", "rms"):
        np.testing.assert_allclose(norm_of(often, kind), norm_of(once, kind), rtol=1e-5)
    with pytest.raises(KeyError):
        norm_of(once, "mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7 * INPUTS, wanda.CHUNK_VALUES])
def test_scores_against_brute_force(monkeypatch, dtype, chunk):
    monkeypatch.setattr(wanda, "CHUNK_VALUES", chunk)
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    norm = norm_of(samples(5), "rms")
    want = weight.double().abs().numpy() * norm.double().numpy()
    weights, neurons = weight_scores(weight, norm), neuron_scores(weight, norm)
    assert weights.dtype == neurons.dtype == torch.float32 and neurons.shape == (OUTPUTS,)
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    np.testing.assert_allclose(neurons, want.sum(1), rtol=1e-5)
    np.testing.assert_allclose(neurons, weights.sum(1), rtol=1e-5)


def test_neuron_scores_never_copy_the_whole_weight(monkeypatch):
    """The largest tensor that is made is a chunk of rows."""
    monkeypatch.setattr(wanda, "CHUNK_VALUES", 50 * INPUTS)
    largest = [0]

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    weight = torch.randn(1000, INPUTS)
    with Watch():
        neuron_scores(weight, torch.ones(INPUTS))
    assert largest[0] <= 1000
