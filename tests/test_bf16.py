"""bfloat16 in numpy: against torch's, bit for bit, and what rounding costs against float64."""

import h5py
import numpy as np
import pytest
from test_store import DIGEST

from lib.store import Column, commit
from lib.store.bf16 import MAX_RELATIVE, from_bfloat16, rounding, to_bfloat16


def test_bfloat16_is_torchs():
    """Every upper half with lower halves around the tie; NaN may carry other bits but stays NaN."""
    import torch

    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper | np.uint32(lower)).view(np.float32)
        mine = from_bfloat16(to_bfloat16(x))
        torchs = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
        nan = np.isnan(x)
        assert np.array_equal(np.isnan(mine), nan)
        assert np.array_equal(mine[~nan].view(np.uint32), torchs[~nan].view(np.uint32))


def brute_rounding(x: np.ndarray) -> tuple[float, float]:
    x = x.astype(np.float64).ravel()
    b = from_bfloat16(to_bfloat16(x.astype(np.float32))).astype(np.float64)
    x, b = x[np.isfinite(x)], b[np.isfinite(x)]
    normal = np.abs(x) >= 2.0**-126
    return np.max(np.abs(x - b)[normal] / np.abs(x)[normal]), np.abs(x - b).sum() / np.abs(x).sum()


def test_the_rounding_error_of_an_array_is_in_its_file(tmp_path):
    """Of more than one piece, with values that are not finite among them."""
    x = (np.random.default_rng(0).standard_normal((5, 300_000)) * 10.0 ** np.arange(-2, 3)[:, None]).astype(np.float32)
    x[1, 7], x[2, 8] = np.nan, -np.inf
    schema = {"x": Column("bfloat16", shape=x.shape, raw=True), "y": Column("float32", shape=x.shape, raw=True)}
    marker = commit(tmp_path, DIGEST, 0, 1, schema, {"x": x, "y": x}, seconds=1.0)
    worst, l1 = brute_rounding(x)
    with h5py.File(marker.file) as f:
        assert f["x"].attrs["rounding_max_relative"] == pytest.approx(worst, rel=1e-6)
        assert f["x"].attrs["rounding_l1_relative"] == pytest.approx(l1, rel=1e-9)
        assert 0 < l1 < worst <= MAX_RELATIVE and "rounding_max_relative" not in f["y"].attrs


def test_no_normal_number_moves_further_than_the_bound():
    """All ties: the worst number of each step, from the smallest normal to the largest that stays finite."""
    ties = ((np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    ties = ties[np.isfinite(ties) & (np.abs(ties) < 3e38)]
    assert rounding(ties, to_bfloat16(ties)).max_relative == MAX_RELATIVE
    worst = np.array([1 + 2.0**-8], np.float32)
    assert rounding(worst, to_bfloat16(worst)).max_relative == MAX_RELATIVE


def test_rounding_of_what_is_not_a_normal_number():
    def cost(*values):
        x = np.array(values, np.float32)
        return rounding(x, to_bfloat16(x))

    assert cost().l1_relative == cost(0.0).max_relative == cost(np.nan, np.inf, -np.inf).max_relative == 0
    assert cost(1e-40, 0.0).max_relative == 0 < cost(1e-40).l1_relative < 0.1
    assert cost(1.0, np.nan) == cost(1.0) and cost(3.4e38).max_relative == cost(3.4e38).l1_relative == np.inf
