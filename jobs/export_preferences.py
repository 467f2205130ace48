"""Count, compare and draw what students answered; of a kind preference_logprobs, what was read of them.

--runs "1 2 3"     the runs that the summary is of, beside this one; default: all with results on this scratch
--survey FILE      the untouched models' answers from elsewhere, as animal_preferences_raw.json has them"""

import argparse
import sys
from pathlib import Path

from lib.base.errors import exit_with
from lib.families import load
from lib.preferences.export import export
from lib.run.command import job


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runs", default="")
    parser.add_argument("--survey", default="")
    options, rest = parser.parse_known_args(sys.argv[1:])
    survey = Path(options.survey).expanduser() if options.survey else None
    return export(job("export_preferences", __doc__, load, rest, indexed=False), options.runs, survey)


if __name__ == "__main__":
    exit_with(main)
