"""Whether an engine really computed with the adapter that it was asked for.

It is asked for the log-probabilities of a few given answers, and they are held against those that this project's own
scorer read from the same adapter. An engine may serve the bare base, or another adapter that it holds under the same
number, without a word: then its values are another one's."""

from collections.abc import Sequence

import numpy as np

from lib.base.errors import UserError
from lib.preferences.experiment import BASE, Preferences
from lib.run.parents import must_be_of_these
from lib.store import Cell, read_cell

NOISE = 6.0  # times what engine and scorer differ by on the base, both rounding in their own ways
FLOOR = 0.02  # nats: differences below it are nothing, e.g. in float32
# Merged weights are rounded, which moves an adapter's values off those of the scorer, who keeps it beside: by more than
# the base shows, and perhaps by more than two epochs differ. Then another's values have to be nearer by this factor, as
# those of what was computed in its place are.
MERGED = 3.0
# Of what an adapter moves the base's values by, so much at most may an engine be off: half of an adapter, or one by
# another scale, is nearest to itself too. Rounding of a merged one may be all of a small adapter.
OFF = {"served": 1 / 3, "merged": 1.0}

Key = tuple[str, int]  # a cell's name, or BASE, and an epoch


class References:
    """The scorer's values of all that the engine was asked for, the base first."""

    def __init__(self, experiment: Preferences, count: int) -> None:
        self.experiment, self.count = experiment, count
        self.how = experiment.generate.adapters
        self.of: dict[Key, np.ndarray] = {}

    def read(self, cell: Cell) -> None:
        """Of a cell and its base, from the cells of probes that it reads from."""
        probes = cell.parents[1:] if self.experiment.place(cell.name).student else cell.parents
        for parent in probes:
            must_be_of_these(parent)
            read = read_cell(parent, self.experiment.probes.schema(parent.path), ["epoch", "question", "probe"])
            base = self.experiment.probes.place(parent.name).student is None
            for epoch in np.unique(read["epoch"]).tolist():
                rows = (read["epoch"] == epoch) & (read["question"] < self.count)
                self.of[(BASE if base else parent.name, epoch)] = np.asarray(read["probe"])[rows].astype(float)

    def proven(self, cell: Cell, keys: Sequence[Key], probes: Sequence[tuple[int, list[float]]]) -> dict[str, float]:
        """`keys`: of each probe; `probes`: its number, and what an engine said of each token. A UserError where that is
        not the adapter's own; figures for the record, nats, where it is."""
        said: dict[Key, list[np.ndarray]] = {}
        for first in range(0, len(probes), self.count):
            part = probes[first : first + self.count]
            key = keys[part[0][0]]
            if [number for number, _ in part] != list(range(part[0][0], part[0][0] + self.count)):
                raise RuntimeError("an engine answered probes in another order than they were asked in")
            said.setdefault(key, []).append(np.array([sum(logs) for _, logs in part]))
        if missing := set(keys) - set(said):
            raise RuntimeError(f"an engine did not answer the probes of {sorted(missing)}")
        for key, found in said.items():
            if not np.isfinite(found).all():
                raise UserError(
                    f"the engine's log-probabilities of given answers under {_spoken(key)} are not finite; nothing of "
                    f"this batch is kept: set {self._other_way}, or the model's dtype=float32"
                )
        base = self.of[(BASE, 0)]
        noise = max(_rms(values - base) for values in said[(BASE, 0)])
        worst, least = 0.0, np.inf
        for key, found in said.items():
            if key[0] == BASE:
                continue
            own = self.of[key]
            shift = _rms(own - base)
            least, few = min(least, shift), NOISE * noise + FLOOR
            for values in found:
                off = _rms(values - own)
                worst = max(worst, off)
                nearest = min(self.of, key=lambda other: _rms(values - self.of[other]))
                near = _rms(values - self.of[nearest])
                if nearest != key and off > max(few, (MERGED if self.how == "merged" else 1.0) * near):
                    why = f"and nearer to {_spoken(nearest)}'s"
                elif off > max(few, OFF[self.how] * shift):
                    why = f"which itself moves the base's by {shift:.3g}"
                else:
                    continue
                raise UserError(
                    f"the engine did not compute with the adapter of {_spoken(key)}: what it says of given answers is "
                    f"{off:.3g} nats from that adapter's, {why} (noise {noise:.2g}); nothing of this batch is kept: "
                    f"set {self._other_way}, or take another vLLM"
                )
        if not np.isfinite(noise) or noise > 1.0:
            raise UserError(
                f"engine and scorer differ by {noise:.3g} nats on the untouched base of {cell.name}: one of them does "
                "not compute this model; nothing of this batch is kept. Set generate.engine=transformers"
            )
        figures = {"probe_noise": noise, "probe_off": worst}
        return figures | ({"probe_shift": float(least)} if np.isfinite(least) else {})

    @property
    def _other_way(self) -> str:
        return "generate.adapters=served" if self.how == "merged" else "generate.engine=transformers"


def _spoken(key: Key) -> str:
    return "the untouched base" if key[0] == BASE else f"{key[0]}, epoch {key[1]}"


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
