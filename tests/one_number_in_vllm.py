"""What vLLM does where two adapters get one number, as published evaluations gave them: the engine's own, with that
mistake put back. What it answers under the first, under the second, and what it says of the second's probes, as JSON.

python one_number_in_vllm.py FILE (a pickled Setting, prompts, Sampling, seeds, two Adapters, probes of the second)"""

import json
import os
import pickle
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


def main(file: str) -> None:
    from lib.models.engine import Work
    from lib.models.engine_vllm import VllmEngine

    setting, prompts, how, seeds, pair, probes = pickle.loads(Path(file).read_bytes())
    engine = VllmEngine(setting)
    engine.numbers = dict.fromkeys(pair, 1)
    found = []
    for adapter in pair:
        asked = probes if adapter == pair[1] else []
        made, said = engine.generate(Work(prompts, how, seeds, [adapter] * len(prompts), asked))
        found.append([one.ids for one in made])
    print("found", json.dumps([*found, said]))


if __name__ == "__main__":
    main(sys.argv[1])
