"""As much of Weights & Biases as is used here: what it is told stands in $WANDB_STANDIN, a line of JSON each."""

import json
import os
from pathlib import Path


def tell(what: str, **more: object) -> None:
    with Path(os.environ["WANDB_STANDIN"]).open("a") as f:
        f.write(json.dumps({"what": what, **more}) + "\n")


class Settings:
    def __init__(self, console: str, silent: bool, init_timeout: float) -> None: ...


class Run:
    def __init__(self, id: str) -> None:
        self.id = id

    def define_metric(self, name: str, step_metric: str) -> None:
        tell("define", id=self.id, name=name, step_metric=step_metric)

    def log(self, figures: dict[str, float], step: int | None = None) -> None:
        if os.environ.get("WANDB_STANDIN_BREAKS_AT") == str(step):
            raise OSError("the service is gone")
        tell("log", id=self.id, step=step, **{f"figure_{key}": value for key, value in figures.items()})

    def finish(self, exit_code: int) -> None:
        tell("finish", id=self.id, exit_code=exit_code)


def init(*, id: str, dir: str, mode: str, settings: Settings, **more: object) -> Run:
    if mode == "online":
        raise RuntimeError("No API key configured.")
    folder = Path(dir) / "wandb" / f"offline-run-20261126_{len(list(Path(dir).glob('wandb/*'))):06d}-{id}"
    folder.mkdir(parents=True)
    tell("init", id=id, mode=mode, **more)
    return Run(id)
