"""Log-likelihoods of one cell's rows: under its prompt and without one (lls), or under one condition (lls_cross)."""

from lib.base.errors import exit_with
from lib.families import load
from lib.lls.kernel import compute
from lib.run.command import job


def main() -> int:
    return compute(job("compute_lls", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
