"""The global threshold: against a full stable sort of all, whatever its sample sees; reads, memory and files."""

import tracemalloc

import h5py
import numpy as np
import pytest

from lib.base.errors import UserError
from lib.pruning import scores as scores_module
from lib.pruning import threshold
from lib.pruning.scores import PIECE, Held, stored_scores
from lib.pruning.threshold import find_threshold, masks
from lib.store.columns import Column
from lib.store.raw import write_with_raw

TINY, SPECIAL = np.float32(1e-45), np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, 3e38, -3e38], np.float32)


def held(*arrays: np.ndarray) -> list[Held]:
    return [Held(f"layers.{i}.fc1", a.astype(np.float32).reshape(-1, 4)) for i, a in enumerate(arrays)]


def chosen(scores: list, count: int) -> np.ndarray:
    found = list(masks(scores, find_threshold(scores, count)))
    assert [(name, mask.shape) for name, mask in found] == [(one.name, one.shape) for one in scores]
    return np.concatenate([mask.reshape(-1) for _, mask in found])


def sorted_first(scores: list[Held], count: int) -> np.ndarray:
    flat = np.concatenate([one.values_JI.reshape(-1) for one in scores])
    mask = np.zeros(len(flat), bool)
    mask[np.argsort(flat, kind="stable")[:count]] = True
    return mask


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces and samples so small that a few thousand values are many of them."""
    monkeypatch.setattr(threshold, "PIECE", 1 << 9)
    monkeypatch.setattr(threshold, "BLOCK", 1 << 7)
    monkeypatch.setattr(threshold, "CHUNK", 8)
    monkeypatch.setattr(threshold, "CHUNKS", 32)


def shapes_of_scores() -> dict[str, list[Held]]:
    rng = np.random.default_rng(0)
    sizes = (2000, 400, 3600)
    return {
        "normal": held(*(rng.standard_normal(n) for n in sizes)),
        "magnitudes": held(*(np.abs(rng.standard_normal(n)) for n in sizes)),
        "decades": held(*(rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-44, 38, n) for n in sizes)),
        "ties": held(*(rng.integers(-2, 3, n) for n in sizes)),
        "zeros": held(
            *(np.where(rng.random(n) < 0.7, rng.choice([0.0, -0.0], n), rng.standard_normal(n)) for n in sizes)
        ),
        "special": held(*(rng.choice(SPECIAL, n) for n in sizes)),
        "one value": held(*(np.full(n, -3.5) for n in sizes)),
        "layers apart": held(*(rng.standard_normal(n) * 1e-3 + 10**i for i, n in enumerate(sizes))),
        "denormal": held(*(rng.integers(-5, 6, n) * TINY for n in sizes)),
    }


@pytest.mark.parametrize("kind", shapes_of_scores())
def test_it_is_what_a_stable_sort_of_everything_puts_first(kind):
    scores = shapes_of_scores()[kind]
    for count in (0, 1, 2, 17, 600, 1999, 2000, 2001, 3000, 4321, 5990, 5999, 6000):
        np.testing.assert_array_equal(chosen(scores, count), sorted_first(scores, count), err_msg=str(count))


def counted_reads(monkeypatch) -> list[int]:
    """How often everything is read."""
    passes = []
    real = threshold._everywhere
    monkeypatch.setattr(threshold, "_everywhere", lambda *args: passes.append(1) or real(*args))
    return passes


def test_one_read_finds_it_and_a_misled_sample_costs_two_more(monkeypatch):
    passes = counted_reads(monkeypatch)
    rng = np.random.default_rng(1)
    fair = held(np.abs(rng.standard_normal(6000)))
    monkeypatch.setattr(threshold, "CHUNKS", 500)
    chosen(fair, 3000)
    assert len(passes) == 1
    unfair = np.abs(rng.standard_normal(6000)) + 5
    monkeypatch.setattr(threshold, "CHUNKS", 10)
    for i in range(10):
        unfair[i * 600 : i * 600 + 8] = 1e-3  # all that the sample sees
    passes.clear()
    np.testing.assert_array_equal(chosen(held(unfair), 3000), sorted_first(held(unfair), 3000))
    assert len(passes) == 3


def test_nan_is_refused_wherever_it_lies_and_counts_that_cannot_be():
    values = np.random.default_rng(0).standard_normal((2, 4000))
    for place in (0, 1, 2500, 3999):
        wrong = values.copy()
        wrong[1, place] = np.nan
        with pytest.raises(UserError, match=r"layers\.1\.fc1 hold NaN"):
            find_threshold(held(*wrong), 3000)
    for count in (-1, 8001):
        with pytest.raises(UserError, match=f"{count} of 8000 weights cannot be pruned"):
            find_threshold(held(*values), count)


def written(folder, sums: dict[str, np.ndarray]):
    """As attribution's merge writes sums."""
    schema = {f"signed/{name}": Column("float32", shape=a.shape, raw=True) for name, a in sums.items()}
    columns = {f"signed/{name}": a for name, a in sums.items()}
    return write_with_raw(folder, lambda sha: f"{len(list(folder.iterdir()))}.h5", schema, columns, {}, None).path


def test_scores_are_means_of_sums_in_files(tmp_path):
    rng = np.random.default_rng(3)
    sums = [
        {f"layers.{i}.fc1": rng.standard_normal((30 + i, 40)).astype(np.float32) for i in range(3)} for _ in range(3)
    ]
    paths = [written(tmp_path, one) for one in sums]
    factors = [1 / 256, 1 / 256, -1 / 93]
    scores = stored_scores(list(zip(paths, factors, strict=True)), "signed", sums[0])
    wants = [sum(np.float64(f) * one[name] for f, one in zip(factors, sums, strict=True)) for name in sums[0]]
    for one, want in zip(scores, wants, strict=True):
        np.testing.assert_allclose(one.read(0, want.size), want.reshape(-1), atol=1e-8)
        np.testing.assert_array_equal(one.read(17, 400), one.read(0, want.size)[17:400])
    mask, flat = chosen(scores, 1800), np.concatenate([want.reshape(-1) for want in wants])
    assert mask.sum() == 1800 and flat[mask].max() < flat[~mask].min() + 1e-8
    (size,) = stored_scores([(paths[0], 1.0)], "signed", ["layers.1.fc1"], absolute=True)
    np.testing.assert_array_equal(size.read(0, 31 * 40), np.abs(sums[0]["layers.1.fc1"]).reshape(-1))


def test_files_that_hold_something_else_are_told(tmp_path):
    one, other = (written(tmp_path, {"layers.0.fc1": np.zeros(shape)}) for shape in ((4, 6), (4, 7)))
    with h5py.File(tmp_path / "chunked.h5", "w") as f:
        f.create_dataset("signed/layers.0.fc1", data=np.zeros((4, 6), np.float32), chunks=(2, 6))
    cut = written(tmp_path, {"layers.0.fc1": np.zeros((4, 6))})
    (scores,) = stored_scores([(cut, 1.0)], "signed", ["layers.0.fc1"])
    cut.write_bytes(cut.read_bytes()[: scores.terms[0].offset + 8])
    for call, says in (
        (
            lambda: stored_scores([(one, 1.0)], "abs", ["layers.0.fc1"]),
            "holds no abs/layers.0.fc1: attribute that layer",
        ),
        (lambda: stored_scores([(one, 1.0), (other, 1.0)], "signed", ["layers.0.fc1"]), "other shapes in"),
        (lambda: stored_scores([(tmp_path / "chunked.h5", 1.0)], "signed", ["layers.0.fc1"]), "no plain float32 array"),
        (lambda: stored_scores([(tmp_path / "none.h5", 1.0)], "signed", ["layers.0.fc1"]), "cannot be read"),
        (lambda: find_threshold([scores], 3), "ends before its arrays"),
    ):
        with pytest.raises(UserError, match=says):
            call()


def test_memory_is_that_of_pieces_and_two_layers_masks(tmp_path, monkeypatch):
    """64 MB of scores, 2 MB a layer's mask: what the pass holds does not grow with their number."""
    monkeypatch.undo()
    monkeypatch.setattr(threshold, "PIECE", 1 << 18)
    monkeypatch.setattr(threshold, "CHUNKS", 256)
    monkeypatch.setattr(threshold, "MOST", 1 << 19)
    rng, layers = np.random.default_rng(0), {}
    for i in range(8):
        layers[f"layers.{i}.fc1"] = rng.random((1000, 2000), np.float32)
    path = written(tmp_path, layers)
    count, whole = 8_000_000, np.concatenate([a.reshape(-1) for a in layers.values()])
    value = np.partition(whole, count - 1)[count - 1]
    scores = stored_scores([(path, 1 / 128)], "signed", layers, absolute=True)
    del layers, whole
    tracemalloc.start()
    found = find_threshold(scores, count)
    zeros = sum(int(mask.sum()) for _, mask in masks(scores, found))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert zeros == count and found.value == value / 128
    pieces = scores_module.THREADS * 4 * (1 << 18) * 4
    assert peak < pieces + 2 * 2_000_000 + threshold.MOST * 8 + (8 << 20), peak
    assert PIECE == 1 << 21
