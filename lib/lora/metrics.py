"""What a training says of each step: lines of JSON, always, and Weights & Biases, where it is wanted.

The lines hold no times, so that a training which was killed ends with the same ones."""

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lib.base.errors import UserError, one_line
from lib.config.frozen import Frozen
from lib.store import Cell

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's own
STATE, FILE = "state.safetensors", "metrics.jsonl"
FOLDER = "wandb"  # of an experiment, where wandb keeps what it has not sent


@dataclass(frozen=True)
class Step:
    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    scored: int

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def read_lines(folder: Path) -> list[str]:
    return (folder / FILE).read_text().splitlines(keepends=True)


def write_lines(folder: Path, lines: list[str]) -> None:
    (folder / FILE).write_text("".join(lines))


def read_steps(folder: Path) -> list[Step]:
    return [Step(**json.loads(line)) for line in read_lines(folder)]


class WandbSpec(Frozen):
    project: str = Field("subliminal-learning-scaling", min_length=1)
    mode: Literal["off", "offline", "online"] = Field(
        "off", description="online: as WANDB_MODE says where that is set, which it is on compute nodes (offline)"
    )


def run_id(cell: Cell) -> str:
    """Of Weights & Biases: the same whenever this very training goes on."""
    return cell.digest[:16]


class Board:
    """A run of Weights & Biases, under the same id whenever its training goes on. The key is the user's own login's, or
    WANDB_API_KEY's: wandb finds it. Nothing that goes wrong with it stops a training that runs."""

    def __init__(self, spec: WandbSpec, cell: Cell, config: Mapping[str, object]) -> None:
        mode = spec.mode if spec.mode == "offline" else os.environ.get("WANDB_MODE") or "online"
        wandb = must_import()
        try:
            self.run: Any = wandb.init(
                project=spec.project,
                id=run_id(cell),
                name=cell.name,
                group=cell.folder.name,
                config={**config, "digest": cell.digest},
                dir=str(cell.folder),  # it makes FOLDER there
                mode=mode,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )
        except Exception as e:
            raise UserError(
                f"Weights & Biases does not begin ({one_line(e)}); run `wandb login`, or say wandb.mode=offline"
            ) from None

    def log(self, step: Step) -> None:
        self._tried(lambda: self.run.log(asdict(step), step=step.step))

    def log_epochs(self, names: str, figures: Sequence[Mapping[str, float]]) -> bool:
        """What was found of a training's epochs when its steps were past: these figures' axis is `epoch`, which each
        of them holds. Whether they were taken."""

        def log() -> None:
            self.run.define_metric(names, step_metric="epoch")
            for one in figures:
                self.run.log(dict(one))

        self._tried(log)
        return self.run is not None

    def close(self, code: int) -> None:
        self._tried(lambda: self.run.finish(exit_code=code))

    def _tried(self, call: Any) -> None:
        if self.run is None:
            return
        try:
            call()
        except Exception as e:
            self.run = None
            print(f"Weights & Biases stopped ({one_line(e)}); {FILE} goes on", flush=True)


def must_import() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as e:
        raise UserError(
            f"wandb.mode asks for Weights & Biases, which is not installed ({one_line(e)}): run "
            "`.venv/bin/python -m pip install wandb`, or set wandb.mode=off"
        ) from None
