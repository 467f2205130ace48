"""Results of another machine's run, brought to this scratch with their digests checked: make import FROM=..."""

import argparse
from contextlib import suppress
from pathlib import Path

from lib.base.errors import UserError, exit_with
from lib.families import load
from lib.run.command import job
from lib.subliminal.bring import bring


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bring", add_help=False, allow_abbrev=False)
    parser.add_argument("--from", dest="source", default="", help="the other machine's scratch")
    parser.add_argument("--stages", default="", help="kinds of stages, e.g. 'preferences preference_logprobs'")
    own, rest = parser.parse_known_args()
    if not own.source:
        raise UserError("from where? say FROM=, the folder that is the other machine's scratch, or a copy of it")
    source = Path(own.source)
    with suppress(RuntimeError):  # a ~ of nobody's home is a name like any other
        source = source.expanduser()
    return bring(job("bring", __doc__, load, rest, indexed=False), source, own.stages.replace(",", " ").split())


if __name__ == "__main__":
    exit_with(main)
