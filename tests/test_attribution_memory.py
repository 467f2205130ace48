"""The plan of attribution's memory against what torch held on a GPU: Llama-3-8B's shapes on an H200 (README, Speed)."""

import pytest

from lib.attribution.memory import GIB, Memory, plan_memory
from lib.bench.attribution import config_of

LAYERS, HIDDEN, INNER, KV = 32, 4096, 14336, 1024
WEIGHTS = 2 * (
    LAYERS * (2 * HIDDEN * (HIDDEN + KV) + 3 * HIDDEN * INNER + 2 * HIDDEN) + 2 * 128256 * HIDDEN + HIDDEN
)  # bytes in bf16
SIZES = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (KV, HIDDEN), "v_proj": (KV, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
SIZES |= {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
ALL = {f"layers.{i}.mlp.{name}": size for i in range(LAYERS) for name, size in SIZES.items()}
UP = {name: size for name, size in ALL.items() if name.endswith("up_proj")}


def planned(tokens: int, *, level: str = "neuron", free: float = 139.0, **more: object) -> Memory:
    scored, scores = (UP, ("signed", "abs")) if level == "neuron" else (ALL, ("abs",))
    batch = (tokens // 2048, 2048)
    options = {"level": level, "scores": scores, "batch": batch, "itemsize": 2, "devices": 1, "free": int(free * GIB)}
    return plan_memory(config_of("llama3-8b"), WEIGHTS, scored, **{**options, **more})


@pytest.mark.parametrize(
    ("held", "tokens", "more"),
    [
        (20.47, 2048, {}),
        (25.87, 4096, {}),
        (15.92, 2048, {"recompute": True}),
        (16.76, 4096, {"recompute": True}),
        (71.55, 8192, {"level": "weight"}),
    ],
)
def test_the_plan_is_what_was_held(held, tokens, more):
    assert planned(tokens, **more).need / GIB == pytest.approx(held, rel=0.02)


def test_an_a100_keeps_everything_and_a_smaller_card_computes_again():
    assert not planned(4096, free=39.4).recompute
    tight = planned(4096, free=20.0)
    assert tight.recompute and tight.need <= tight.free
    assert "computed again in the backward pass" in str(tight) and "all activations kept" in str(planned(2048))


def test_more_blocks_hold_the_sums_of_two():
    one, two, five = (planned(8192, level="weight", blocks=n) for n in (1, 2, 5))
    assert two.need - one.need == one.totals == 4 * sum(j * i for j, i in ALL.values()) and five.need == two.need
