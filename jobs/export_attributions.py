"""Merge an attribution experiment's shards and write what researchers read: scores, a table, plots."""

from lib.attribution.export import export
from lib.base.errors import exit_with
from lib.families import load
from lib.run.command import job


def main() -> int:
    return export(job("export_attributions", __doc__, load, indexed=False))


if __name__ == "__main__":
    exit_with(main)
