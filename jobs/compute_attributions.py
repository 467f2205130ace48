"""Attribution of one cell's samples: relevance of neurons or weights by LRP, and Wanda's statistics, in one pass."""

from lib.attribution.kernel import compute
from lib.base.errors import exit_with
from lib.families import load
from lib.run.command import job


def main() -> int:
    return compute(job("compute_attributions", __doc__, load))


if __name__ == "__main__":
    exit_with(main)
