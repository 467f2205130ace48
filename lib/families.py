"""What an experiment is: a validated, frozen configuration, the inputs it needs, its cells and their digests.
Public: load, Experiment, KINDS. Knows no kernel, no Slurm, no torch."""

from lib.attribution.experiment import Attribution
from lib.config.loading import overrides_of
from lib.families import KINDS, load
from lib.lls.experiment import LLS, LLSCross, Scoring
from lib.run.experiment import Experiment

__all__ = ["KINDS", "LLS", "Attribution", "Experiment", "LLSCross", "Scoring", "load", "overrides_of"]
