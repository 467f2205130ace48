"""How fast scoring and attribution are against what the hardware can do, the plain loop and vLLM, all in one run; with
random weights of the real shapes, which run at the speed of real ones and say nothing about quality.

    python -m jobs.bench --models 0.5b 7b --rungs floor naive ours bits [--batch-tokens 8192] [--out FILE.json]
    python -m jobs.bench --models llama3-8b --rungs floor plain seed ours bits memory --batch-tokens 2048
    python -m jobs.bench --models disk --rungs store  # what a disk takes (TMPDIR); needs no GPU"""

import argparse
import json
import sys
from pathlib import Path

import torch

from lib.bench import attribution, lora, lora_whole, numbers, preferences, pruning, scoring, store, sweep, sweep_whole
from lib.bench.llamas import LLAMAS
from lib.bench.shapes import SHAPES, free, machine

OF_QWENS = scoring.RUNGS | lora.RUNGS | lora_whole.RUNGS | numbers.RUNGS | preferences.RUNGS
OF_LLAMAS = attribution.RUNGS | pruning.RUNGS | sweep.RUNGS | sweep_whole.RUNGS
SUITES = {**dict.fromkeys(SHAPES, OF_QWENS), **dict.fromkeys(LLAMAS, OF_LLAMAS), "disk": store.RUNGS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SUITES), default=["0.5b", "7b"])
    rungs = list(dict.fromkeys([*OF_QWENS, *OF_LLAMAS, *store.RUNGS]))
    parser.add_argument(
        "--rungs", nargs="+", choices=rungs, default=["floor", "naive", "plain", "seed", "ours", "bits"]
    )
    parser.add_argument("--batch-tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = set(args.models) != {"disk"}
    if on_gpu and not torch.cuda.is_available():
        sys.exit("error: the bench measures a GPU and none is visible; run it with `sbatch slurm/bench.sbatch`")
    about, results = machine() if on_gpu else {}, []
    print(json.dumps(about))
    for model in args.models:
        for batch_tokens in args.batch_tokens:
            for rung in [rung for rung in args.rungs if rung in SUITES[model]]:
                if on_gpu:
                    free()
                try:
                    result = SUITES[model][rung](model, batch_tokens)
                except torch.cuda.OutOfMemoryError as e:
                    result = {"error": " ".join(str(e).split())[:120]}
                results.append({"model": model, "rung": rung, "batch_tokens": batch_tokens, **result})
                print(json.dumps(results[-1]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps({"machine": about, "rungs": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
