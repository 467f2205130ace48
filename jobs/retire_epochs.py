"""Remove students' epochs before the last from scratch, where what asks them is done, and what publishes them.

--publish "configs/publish.yaml epochs=all"   leave those that are not published yet; '': publishing is not looked at
--dry                                         say what would be freed"""

import argparse
import sys

from lib.base.errors import UserError, exit_with
from lib.config.loading import overrides_of
from lib.families import load
from lib.preferences.experiment import Preferences
from lib.publish.experiment import Publish
from lib.publish.retire import retire_epochs
from lib.run.command import job


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.retire_epochs", add_help=False, allow_abbrev=False)
    parser.add_argument("--publish", default="")
    parser.add_argument("--dry", action="store_true")
    options, rest = parser.parse_known_args(sys.argv[1:])
    this = job("retire_epochs", __doc__, load, rest, indexed=False)
    preferences, publish = this.of(Preferences), None
    if options.publish.strip():
        path, *overrides = overrides_of(options.publish)
        publish = load(path, [*overrides, f"run_id={preferences.run_number}"])
        if not isinstance(publish, Publish):
            raise UserError(f"PUBLISH={path} is of kind {publish.kind}; name a configuration of kind publish")
    return retire_epochs(preferences, publish, this.site.cache, this.site.scratch, options.dry)


if __name__ == "__main__":
    exit_with(main)
