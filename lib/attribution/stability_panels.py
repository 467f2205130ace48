"""The stability of every selection that a set of attributions offers, ready to be drawn.

`scores` gives a set's scores of single samples when asked, so that only two sets are in memory at a time."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lib.attribution.plots import Curve, Panel
from lib.attribution.stability import between, bootstrap, reference_curve

SIZES = (10, 30, 100, 300, 1000, 3000, 10_000)
RESAMPLES = 200
BAND = (0.05, 0.95)
ABOUT = (
    f"Bands: {100 * BAND[0]:.0f} % to {100 * BAND[1]:.0f} % of {RESAMPLES} resamples of the samples, "
    "against the selection from all. Between seeds: mean and range over pairs"
)

Scores = Callable[[str], np.ndarray]


def sizes_for(neurons: int) -> list[int]:
    """Selections of up to a tenth of what there is."""
    return [n for n in SIZES if n <= neurons // 10] or [max(neurons // 10, 1)]


def panels(
    general: Sequence[str], behaviours: Sequence[str], means: Mapping[str, np.ndarray], scores: Scores
) -> list[Panel]:
    """The highest of each set; the lowest of general - behaviour; the highest again, from fewer samples."""
    sizes = sizes_for(min(int(np.isfinite(values).sum()) for values in means.values()))
    made = [Panel("Highest N of each set", "N", sizes, _highest(general, means, scores, sizes))]
    for behaviour in behaviours if general else ():
        made.append(
            Panel(
                f"Lowest N of general − {behaviour}", "N", sizes, _differences(general, behaviour, means, scores, sizes)
            )
        )
    return [*made, *_fewer(list(means), scores, sizes[len(sizes) // 2])]


def _highest(
    general: Sequence[str], means: Mapping[str, np.ndarray], scores: Scores, sizes: Sequence[int]
) -> list[Curve]:
    curves = [_band(n, bootstrap(scores(n), sizes, lowest=False, count=RESAMPLES), BAND, n) for n in means]
    if len(general) > 1:
        curves.append(_band("between seeds", between([means[g] for g in general], sizes, lowest=False), (0, 1)))
    return curves


def _differences(
    general: Sequence[str], behaviour: str, means: Mapping[str, np.ndarray], scores: Scores, sizes: Sequence[int]
) -> list[Curve]:
    minus = scores(behaviour)
    curves = [_band(g, bootstrap(scores(g), sizes, minus_SN=minus, count=RESAMPLES), BAND, g) for g in general]
    if len(general) > 1:
        curves.append(_band("between seeds", between([means[g] - means[behaviour] for g in general], sizes), (0, 1)))
    return curves


def _fewer(names: Sequence[str], scores: Scores, size: int) -> list[Panel]:
    """From the first 1, 2, 4, ... samples of a set."""
    found = {}
    for name in names:
        values = scores(name)
        firsts = [2**i for i in range(12) if 2**i < len(values)]
        if firsts:
            found[name] = firsts, reference_curve(values, firsts, [size], lowest=False)[:, 0]
    if not found:
        return []
    longest = max((firsts for firsts, _ in found.values()), key=len)
    curves = [
        Curve(n, np.pad(kept, (0, len(longest) - len(kept)), constant_values=np.nan), set=n)
        for n, (_, kept) in found.items()
    ]
    return [Panel(f"Highest {size:,} from fewer samples", "First samples of a set", longest, curves)]


def _band(label: str, overlap: np.ndarray, ends: tuple[float, float], name: str = "") -> Curve:
    low, high = np.quantile(overlap, ends, axis=0)
    return Curve(label, overlap.mean(0), low, high, name)
