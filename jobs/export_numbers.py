"""Write every cell's answers, the valid ones, and how many each rule left out."""

from lib.base.errors import exit_with
from lib.families import load
from lib.numbers.export import export
from lib.run.command import job


def main() -> int:
    return export(job("export_numbers", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
