"""Perplexity with a share of all weights zero, as a table and a picture, with what others measured beside it."""

from lib.base.errors import exit_with
from lib.families import load
from lib.pruning.sparsity_export import export
from lib.run.command import job


def main() -> int:
    return export(job("sparsity_report", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
