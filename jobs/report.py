"""A run on one static page: progress, results, cost, failures; with what each stage exports."""

from lib.base.errors import exit_with
from lib.families import load
from lib.run.command import job
from lib.subliminal.report import report


def main() -> int:
    return report(job("report", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
