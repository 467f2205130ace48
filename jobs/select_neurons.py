"""Rank neurons for pruning by their attributions, one array index a ranking."""

from lib.base.errors import exit_with
from lib.families import load
from lib.pruning.rank import compute
from lib.run.command import job


def main() -> int:
    return compute(job("select_neurons", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
