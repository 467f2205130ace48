"""Ask a node with a GPU what it can do (`make doctor GPU=1`); --answer is what runs there."""

import argparse
from pathlib import Path

from lib.base.errors import UserError, exit_with
from lib.cluster import probe
from lib.run.site import site


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.probe", description=__doc__)
    parser.add_argument("--answer", type=Path, metavar="FOLDER", help="on scratch; holds `data`, gets `answer.json`")
    args = parser.parse_args()
    if args.answer:
        from lib.bench.probe import answer  # with torch

        answer(args.answer, site())
        return 0
    try:
        return probe.show(site())
    except KeyboardInterrupt:
        raise UserError("interrupted; the probe was cancelled") from None


if __name__ == "__main__":
    exit_with(main)
