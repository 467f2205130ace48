"""The bench's rungs of pruning on a CPU with small shapes: they run, and what they say of bits is so."""

import torch

from lib.bench import llamas, pruning
from lib.pruning.neurons import Pruner

SMALL = {"small": (3, 32, 48, 4, 2, 100)}


def test_neurons_go_and_every_bit_comes_back(monkeypatch):
    monkeypatch.setitem(llamas.LLAMAS, "small", SMALL["small"])
    monkeypatch.setattr(pruning, "NEURONS", 40)
    found = pruning.neurons("small", torch.device("cpu"), torch.float32)
    assert found["changed"] and found["same_bits_after"] and found["neurons"] == 40
    assert found["launches"] == 2 * 2 * 3 and found["apply_ms"] > 0
    real = Pruner.undo

    def forgets(self) -> None:
        edit = self._undo[0][0]
        real(self)
        edit.tensor[edit.index[0], 5] = edit.tensor[edit.index[0], 5].nextafter(torch.tensor(9.0))

    monkeypatch.setattr(Pruner, "undo", forgets)
    assert not pruning.neurons("small", torch.device("cpu"), torch.float32)["same_bits_after"]


def test_the_threshold_is_measured_beside_plain_reading(monkeypatch, tmp_path):
    monkeypatch.setitem(llamas.LLAMAS, "small", SMALL["small"])
    found = pruning.threshold("small", folder=str(tmp_path))
    assert found["zeros_right"] and found["gb"] == round(3 * 48 * 32 * 4 / 1e9, 3)
    assert min(found[f"{name}_gb_s"] for name in ("plain", "find", "mask")) >= 0
    assert not list(tmp_path.iterdir())
