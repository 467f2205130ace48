"""The whole path on a machine with nothing: a small teacher, its numbers, LLS of 15 animals, the matrix of all prompts
on all datasets, and the attribution of the teacher's neurons, through the cluster's job code (a task a cell, by the
local executor), merge, tables, plots, report. What is done is not done again."""

import sys

from lib.demo.demo import main

if __name__ == "__main__":
    sys.exit(main())
