"""The one list of experiments. A new one: its folder, a configuration, a job, a batch file, and its line here."""

from pathlib import Path

from lib.attribution.experiment import Attribution
from lib.config import loading
from lib.lls.experiment import LLS, LLSCross
from lib.lls.numbers import LLSNumbers
from lib.lora.experiment import Finetune
from lib.numbers.experiment import Numbers
from lib.preferences.experiment import Logprobs, Preferences
from lib.pruning.experiment import Selection
from lib.pruning.sparsity import Sparsity
from lib.pruning.sweep import Sweep
from lib.publish.experiment import Publish
from lib.run.experiment import Experiment
from lib.run.pipeline import Pipeline

KINDS: dict[str, type[Experiment]] = {
    "lls": LLS,
    "lls_cross": LLSCross,
    "lls_numbers": LLSNumbers,
    "attribution": Attribution,
    "selection": Selection,
    "sweep": Sweep,
    "sparsity": Sparsity,
    "numbers": Numbers,
    "finetune": Finetune,
    "preference_logprobs": Logprobs,
    "preferences": Preferences,
    "pipeline": Pipeline,
    "publish": Publish,
}


def load(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """The experiment in a file, with dotted key=value overrides applied."""
    found = loading.load(path, overrides, KINDS)
    return found.opened(load) if isinstance(found, Pipeline) else found
