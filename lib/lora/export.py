"""Write what one wants of students that are trained:

<output root>/<experiment>/{size}/{trait}/adapter_model.safetensors, adapter_config.json   the last epoch's, a folder
                                                                                           that peft and vLLM load
<output root>/<experiment>/{size}/{trait}/metrics.jsonl     loss, rate, gradient's norm, tokens of every step
<output root>/<experiment>/{size}/{trait}/provenance.json   where each epoch's adapter lies on scratch, its sha256
<output root>/<experiment>/students.txt, students.json, loss.png

Of students of parts of the rows {size}/{trait}/{part}/ holds the same."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.base.atomic import keep_others, read_json, write_bytes, write_json
from lib.lora.epochs import by_epoch, file_of, states_of
from lib.lora.experiment import Finetune
from lib.lora.metrics import CONFIG, FILE, WEIGHTS, Step
from lib.lora.plots import plot_loss
from lib.report.tables import Column, Table
from lib.run.command import Job
from lib.run.extent import extent
from lib.run.results import all_done
from lib.store import Cell, Folder, needed


@dataclass(frozen=True)
class Trained:
    epochs: Mapping[int, Folder]  # retired ones too
    losses: list[float]  # of each epoch, the mean over its scored tokens
    tokens: int
    seconds: float

    @property
    def last(self) -> Folder:
        return self.epochs[max(self.epochs)]


def export(this: Job) -> int:
    experiment, cells = this.of(Finetune), this.cells()
    folder = this.site.output / experiment.label
    found = {cell.name: trained(experiment, cell) if extent(cell).whole else None for cell in cells}
    for cell in cells:
        if one := found[cell.name]:
            write_student(this, cell, one, folder.joinpath(*filter(None, experiment.parts[cell.index])))
    table = table_of(found)
    write_bytes(folder / "students.txt", (table.text() + "\n").encode())
    figures = {name: one and {"losses": one.losses, "tokens": one.tokens} for name, one in found.items()}
    write_json(folder / "students.json", figures)
    losses = [one.losses if one else None for one in found.values()]
    plot_loss(dict(zip(experiment.parts, losses, strict=True)), folder / "loss.png")
    print(table.text())
    for name in ("students.txt", "loss.png"):
        print(folder / name)
    all_done(cells, [cell for cell in cells if found[cell.name]])
    return 0


def trained(experiment: Finetune, cell: Cell) -> Trained:
    schedule = experiment.schedule()
    done = states_of(cell)
    epochs = by_epoch(done, schedule)
    needed(epochs[schedule.epochs])
    steps = [Step(**json.loads(line)) for line in file_of(epochs[schedule.epochs], FILE).splitlines()]
    losses = [_mean([step for step in steps if step.epoch == epoch]) for epoch in sorted(epochs)]
    return Trained(epochs, losses, sum(step.tokens for step in steps), sum(one.seconds for one in done))


def _mean(steps: list[Step]) -> float:
    return sum(step.loss * step.scored for step in steps) / sum(step.scored for step in steps)


def write_student(this: Job, cell: Cell, one: Trained, folder: Path) -> None:
    record, names = folder / "provenance.json", (WEIGHTS, CONFIG, FILE)
    keep_others(cell.digest, (read_json(record) or {}).get("digest"), *(folder / name for name in names), record)
    for name in names:
        write_bytes(folder / name, file_of(one.last, name))
    epochs = {
        str(epoch): {
            "folder": None if state.retired else str(state.folder),
            "sha256": next(file.sha256 for file in state.files if file.path == WEIGHTS),
        }
        for epoch, state in one.epochs.items()
    }
    about = {"digest": cell.digest, "cell": cell.name, "epochs": epochs, "made": asdict(one.last.made)}
    write_json(record, {**about, "experiment": this.experiment.model_dump(mode="json")})


def table_of(found: Mapping[str, Trained | None]) -> Table:
    columns = [Column("student"), Column("epochs", "d"), Column("loss, first epoch", ".4f"), Column("last", ".4f")]
    columns += [Column("tokens", ",d"), Column("tokens/s", ",.0f")]
    rows = [
        (name, len(one.losses), one.losses[0], one.losses[-1], one.tokens, one.tokens / max(one.seconds, 1e-9))
        if one
        else (name, *[None] * 5)
        for name, one in found.items()
    ]
    return Table("students", "Students, and the loss on their own training rows (nats a token)", columns, rows)
