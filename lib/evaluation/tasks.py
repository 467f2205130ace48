"""Zero-shot tasks by lm-evaluation-harness on a model that is loaded: its own tasks by name, or YAML files of a folder.

The tasks are set up once, documents and all, and asked again after each change of the model's weights. A job fetches
nothing: a dataset lies in the cache of `datasets`, where `bring` put it, or in local files."""

import copy
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.base.errors import UserError, nearest, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Metrics = dict[str, tuple[float, float]]  # name -> value and standard error; NaN where the harness gives none
RESAMPLES = 1000  # for the standard errors that have no formula


class Tasks:
    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        """`folder`: YAML files in the harness' own form; their names come before the harness'."""
        self.names, self.manager = ", ".join(names), _manager(names, folder)
        self.asked = [one for name in names for one in _set_up(self.manager, name)]

    def __call__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: int = 16, limit: int | None = None
    ) -> dict[str, Metrics]:
        """Task (and group of tasks) -> metrics; `limit`: only the first documents of each task, for a trial."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        own: Any = copy.deepcopy(tokenizer)  # the harness gives it a padding token
        with _offline(), _quiet(), _packages(self.names):
            judged = HFLM(pretrained=model, tokenizer=own, batch_size=batch)
            found = simple_evaluate(
                judged,
                tasks=self.asked,
                num_fewshot=0,
                limit=limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
                task_manager=self.manager,
            )
        assert found is not None  # in the first process of one
        return {task: _metrics(values) for task, values in found["results"].items()}


def bring(names: Sequence[str], folder: Path | None = None, update: bool = False) -> None:
    """The documents of these tasks, where there is a network. What is there already stays, so that all settings of a
    sweep are asked the same."""
    manager = _manager(names, folder)
    for name in names:
        there = not update and _is_there(manager, name)
        if not there:
            _set_up(manager, name, offline=False)
        print(f"task {name}: its documents are {'there' if there else 'fetched'}", flush=True)


def _is_there(manager: Any, name: str) -> bool:
    try:
        _set_up(manager, name)
    except UserError:
        return False
    return True


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """What knows all these names. The harness' own 14,000 take many seconds to read, so only where they are needed."""
    from lm_eval.tasks import TaskManager

    own = str(folder) if folder else None
    if folder and not folder.is_dir():
        raise UserError(f"{folder} is no folder of tasks (YAML files in lm-evaluation-harness' form)")
    if own and set(names) <= set((few := TaskManager(include_path=own, include_defaults=False)).all_tasks):
        return few
    every = TaskManager(include_path=own)
    for name in names:
        if name not in every.all_tasks:
            where = f"neither lm-evaluation-harness nor {own} has" if own else "lm-evaluation-harness has not"
            raise UserError(f"{where} a task '{name}'{nearest(name, every.all_tasks)}")
    return every


def _set_up(manager: Any, name: str, offline: bool = True) -> list[Any]:
    """The task, the group, or the tasks of a tag."""
    try:
        with _offline() if offline else nullcontext(), _quiet():
            loaded = manager.load([name])
    except Exception as e:  # of datasets, the hub, YAML, jinja and the task's own code
        what = f"task {name} cannot be set up ({type(e).__name__}: {one_line(e)}); "
        if offline:
            fix = "where its dataset is missing, run `make fetch` with this CONFIG where there is a network; otherwise "
            raise UserError(f"{what}{fix}mend its YAML file") from None
        raise UserError(f"{what}mend its YAML file, or try again where there is a network") from None
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _metrics(values: Mapping[str, Any]) -> Metrics:
    """The harness' keys are "acc,none" and "acc_stderr,none": the second part is the filter of the answers."""
    found = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{name}_stderr,{kind}")
            named = name if kind == "none" else key
            found[named] = float(value), float(error) if isinstance(error, int | float) else math.nan
    return found


@contextmanager
def _offline() -> Iterator[None]:
    """A job must not depend on a network, and a sweep not on the minute in which it asks."""
    import datasets
    import huggingface_hub

    places = (datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")
    before = [getattr(*place) for place in places]
    for place in places:
        setattr(*place, True)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(*place, value)


@contextmanager
def _packages(names: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as e:
        raise UserError(
            f"a metric of {names} needs the package {e.name}, which the set-up leaves out; choose tasks with another "
            "metric, or install it into .venv"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Bars, dozens of them, are for a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield
