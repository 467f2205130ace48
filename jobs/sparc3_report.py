"""What pruning did to a model, as a static page with tables and pictures, and every selection as CSV and JSON."""

from lib.base.errors import exit_with
from lib.families import load
from lib.pruning.export import export
from lib.run.command import job


def main() -> int:
    return export(job("sparc3_report", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
