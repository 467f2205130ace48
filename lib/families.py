"""The one list of experiments. A new one: its folder, a configuration, a job, a batch file, and its line here."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from lib.config import loading
from lib.run.experiment import Experiment
from lib.run.pipeline import Pipeline

KINDS = {
    "lls": "lib.lls.experiment:LLS",
    "lls_cross": "lib.lls.experiment:LLSCross",
    "lls_numbers": "lib.lls.numbers:LLSNumbers",
    "attribution": "lib.attribution.experiment:Attribution",
    "selection": "lib.pruning.experiment:Selection",
    "sweep": "lib.pruning.sweep:Sweep",
    "sparsity": "lib.pruning.sparsity:Sparsity",
    "numbers": "lib.numbers.experiment:Numbers",
    "finetune": "lib.lora.experiment:Finetune",
    "preference_logprobs": "lib.preferences.experiment:Logprobs",
    "preferences": "lib.preferences.experiment:Preferences",
    "pipeline": "lib.run.pipeline:Pipeline",
    "publish": "lib.publish.experiment:Publish",
}


class Kinds(Mapping[str, type[Experiment]]):
    """Of each its class, which is imported when it is asked for: most commands are about one kind."""

    def __getitem__(self, kind: str) -> type[Experiment]:
        module, _, name = KINDS[kind].partition(":")
        return getattr(import_module(module), name)

    def __iter__(self) -> Iterator[str]:
        return iter(KINDS)

    def __len__(self) -> int:
        return len(KINDS)


def load(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """The experiment in a file, with dotted key=value overrides applied."""
    found = loading.load(path, overrides, Kinds())
    return found.opened(load) if isinstance(found, Pipeline) else found
