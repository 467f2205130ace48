"""The figures that others have measured: computes those that need nothing else, and says how far each is."""

from lib.base.errors import exit_with
from lib.families import load
from lib.pruning.anchors import compare
from lib.run.command import job


def main() -> int:
    return compare(job("anchors", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
