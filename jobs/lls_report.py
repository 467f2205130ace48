"""What LLS scores say, as a static page: separation, contrast, quintiles, heat maps, tokens; and rows to fine-tune on.

--measure mean|sum[+end][@k]    how a row's score is made, default mean
--select "top:0.2 clean:0.2"    kind:amount (rows or share)[:contrast][:from=DATASET][:exclude=SHARE]

<output root>/<experiment>/report/index.html, report.txt, *.png     for the default measure
<output root>/<experiment>/report/<measure>/                        the same for another
.../select/<prompt>/<selection>.jsonl, .provenance.json

Of a run's numbers <output root>/<experiment>/report/<size>/ holds the same of each size."""

import argparse
import sys

from lib.base.errors import exit_with
from lib.families import load
from lib.lls.matrix import Measure
from lib.lls.report import report
from lib.lls.select import Choice
from lib.run.command import job


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--measure", default="mean")
    parser.add_argument("--select", default="")
    options, rest = parser.parse_known_args(sys.argv[1:])
    measure, choices = Measure.parse(options.measure), [Choice.parse(text) for text in options.select.split()]
    return report(job("lls_report", __doc__, load, rest, indexed=False), measure, choices)


if __name__ == "__main__":
    exit_with(main)
