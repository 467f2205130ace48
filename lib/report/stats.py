"""Statistics that all results share."""

import math

import numpy as np

Z95 = 1.959964  # two-sided 95 % of the normal distribution


def mean_interval(values: np.ndarray | None) -> tuple[float, float]:
    """95 %, normal: cells hold hundreds to thousands of rows."""
    if values is None or len(values) < 2:
        return math.nan, math.nan
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def maxima(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(column of each row's maximum, row of each column's); -1 where there are fewer than 2 cells to compare."""
    return _argmax(means), _argmax(means.T)


def _argmax(rows: np.ndarray) -> np.ndarray:
    return np.array([int(np.nanargmax(r)) if np.isfinite(r).sum() > 1 else -1 for r in rows], int)


def wilson(hits: float, n: float, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a share; it keeps to [0, 1], and holds where hits are few."""
    if n <= 0:
        return math.nan, math.nan
    share, spread = hits / n, z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) / n * z**2 + spread**2 / 4) / (1 + spread)
    return middle - half, middle + half
