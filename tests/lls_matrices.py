"""Made-up LLS matrices for tests: known shapes, no model."""

import numpy as np

from lib.lls.matrix import Matrix, Pass, Rescored

ANIMALS = ("bear", "cat", "dog")


def make_matrix(
    animals=ANIMALS, controls=("parrot",), neutral=True, n=60, seed=0, drop=(), stored=True, noise=False
) -> Matrix:
    """Own cells lie a little higher than others, neutral lower; every 17th row has no score."""
    prompts, datasets = (*animals, *controls), (*animals, *(("neutral",) if neutral else ()))
    rng = np.random.default_rng(seed)
    base, passes, rescored = {}, {}, {}
    for d in datasets:
        status = (np.arange(n) % 17 == 16).astype(np.uint8)
        tokens = np.where(status == 0, rng.integers(3, 12, n), 0).astype(np.int32)
        row = np.repeat(np.arange(n), tokens)
        plain = -rng.exponential(1.4, len(row)).astype(np.float32)
        base[d] = _pass(status, tokens, row, plain, rng, stored)
        for p in prompts:
            if (p, d) in drop:
                continue
            shift = rng.normal(-0.1 if d == "neutral" else 0.12 + 0.05 * (p == d), 0.3, len(row))
            passes[p, d] = _pass(status, tokens, row, (plain + shift).astype(np.float32), rng, stored)
            if noise:
                rows = np.flatnonzero(status == 0)[:12]
                exact = (passes[p, d].sums - base[d].sums)[rows]
                rescored[p, d] = Rescored(rows, exact + rng.normal(0, 0.01, len(rows)) * tokens[rows])
    return Matrix(prompts, datasets, base, passes, rescored)


def _pass(status, tokens, row, values, rng, stored) -> Pass:
    sums = np.where(status == 0, np.bincount(row, weights=values, minlength=len(status)), np.nan)
    end = np.where(status == 0, -rng.exponential(0.1, len(status)), np.nan).astype(np.float32)
    return Pass(status, tokens, sums, end if stored else None, values if stored else None)
