"""Merge an LLS experiment's shards and write what researchers read: JSONL as in the original layout, a table, plots."""

from lib.base.errors import exit_with
from lib.families import load
from lib.lls.export import export
from lib.run.command import job


def main() -> int:
    return export(job("export_lls", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
