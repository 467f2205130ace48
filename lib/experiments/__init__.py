"""What an experiment is: a validated, frozen configuration, the inputs it needs, its cells and their digests.
Public: load, Experiment, KINDS. Knows no kernel, no Slurm, no torch."""

from lib.experiments.attribution import Attribution
from lib.experiments.base import Experiment
from lib.experiments.lls import LLS, LLSCross, Scoring
from lib.experiments.loading import KINDS, load, overrides_of

__all__ = ["KINDS", "LLS", "Attribution", "Experiment", "LLSCross", "Scoring", "load", "overrides_of"]
