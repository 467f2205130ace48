"""Teachers write numbers: a size and a trait a cell, one engine for all cells of a task."""

from lib.base.errors import exit_with
from lib.families import load
from lib.numbers.kernel import compute
from lib.run.command import job


def main() -> int:
    return compute(job("generate_numbers", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
