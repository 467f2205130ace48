"""Perplexity with a share of all weights zero, one array index a method on one seed's general text."""

from lib.base.errors import exit_with
from lib.families import load
from lib.pruning.weight_kernel import compute
from lib.run.command import job


def main() -> int:
    return compute(job("prune_weights", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
