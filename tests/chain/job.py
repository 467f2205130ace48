"""A stage of the tests' chain."""

from lib.chain.kernel import compute

from lib.base.errors import exit_with
from lib.families import load
from lib.run.command import job


def main() -> int:
    return compute(job("run_chain", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
