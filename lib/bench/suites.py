"""All rungs, by the models that they are for."""

from lib.bench import (
    attribution,
    lora,
    lora_whole,
    numbers,
    packed,
    preferences,
    pruning,
    run_whole,
    scoring,
    store,
    sweep,
    sweep_whole,
)
from lib.bench.llamas import LLAMAS
from lib.bench.shapes import SHAPES

OF_QWENS = (
    scoring.RUNGS | packed.RUNGS | lora.RUNGS | lora_whole.RUNGS | numbers.RUNGS | preferences.RUNGS | run_whole.RUNGS
)
OF_LLAMAS = attribution.RUNGS | pruning.RUNGS | sweep.RUNGS | sweep_whole.RUNGS
SUITES = {**dict.fromkeys(SHAPES, OF_QWENS), **dict.fromkeys(LLAMAS, OF_LLAMAS), "disk": store.RUNGS}
RUNGS = list(dict.fromkeys(rung for suite in SUITES.values() for rung in suite))
