"""A model without the first neurons of a ranking of a sweep, as a folder that transformers loads.

--ranking lrp  --neurons 100  --remove: taken out, where every layer loses as many (scope: layer), not set to 0"""

import argparse
import sys

from lib.base.errors import exit_with
from lib.families import load
from lib.pruning.saved import save
from lib.run.command import job, natural


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.save_pruned", add_help=False, allow_abbrev=False)
    parser.add_argument("--ranking", default="lrp")
    parser.add_argument("--neurons", type=natural, default=100)
    parser.add_argument("--remove", action="store_true")
    options, rest = parser.parse_known_args(sys.argv[1:])
    return save(
        job("save_pruned", __doc__, load, rest, indexed=False), options.ranking, options.neurons, options.remove
    )


if __name__ == "__main__":
    exit_with(main)
