"""What a repository holds, by what lies on scratch:

a dataset    filtered.jsonl (the split that load_dataset gives), raw.jsonl, provenance.json, README.md
an adapter   adapter_model.safetensors, adapter_config.json (peft's), metrics.jsonl, provenance.json, README.md"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lib.base.atomic import json_bytes
from lib.base.errors import UserError
from lib.lora.export import Trained, trained
from lib.lora.metrics import CONFIG, FILE, WEIGHTS
from lib.numbers.export import PROVENANCE, provenance, texts_of
from lib.preferences.judge import DEFAULT
from lib.preferences.runs import count
from lib.preferences.statistics import rate_of
from lib.preferences.tally import Tally
from lib.publish.cards import CARD, Adapter, Dataset, adapter_card, dataset_card
from lib.publish.experiment import Item, Publish
from lib.publish.files import File, from_bytes, from_disk
from lib.run.extent import extent
from lib.run.parents import contents
from lib.store import Cell, Folder, Piece, needed


@dataclass
class Contents:
    """Of the repositories of one cell."""

    experiment: Publish
    cache: Path
    cell: Cell
    owner: str

    def files(self, item: Item) -> list[File]:
        return self._dataset() if item.what == "dataset" else self._adapter(item.epoch)

    def id(self, item: Item) -> str:
        return self.experiment.repository(self.cell.name, item, self.owner)

    @property
    def student(self) -> Cell:
        return self.cell.parents[1 if self.experiment.numbers else 0]

    @cached_property
    def said(self) -> dict[int, dict[str, object]]:
        """Epoch -> how often the student says its trait, and so the untouched model; nothing of one without words."""
        asked, trait = self.experiment.asked, self.experiment.source.source.split(self.student.parents[0].name)[1]
        if not asked or not trait.words:
            return {}
        own, base = (count(asked, cell, self.cache).tallies for cell in self.cell.parents[-2:])
        place = [one.name for one in asked.judged].index(trait.name)
        untouched = _shown(base[0], place)
        return {epoch: {"student": _shown(one, place), "base": untouched} for epoch, one in own.items()}

    @cached_property
    def trained(self) -> Trained:
        return trained(self.experiment.source, self.student)

    def _dataset(self) -> list[File]:
        numbers, teacher = self.experiment.source.source, self.cell.parents[0]
        texts, one = texts_of(numbers, self.cache, teacher)
        record = provenance(numbers, teacher, texts, one) | {"made": made_by(extent(teacher).pieces[0][0])}
        size, trait = numbers.split(teacher.name)
        about = Dataset(self.id(Item("dataset")), size, trait, numbers.sizes[size], one, record)
        card = dataset_card(about, self.experiment.license)
        return [*(from_bytes(name, data) for name, data in texts.items()), *_said(record, card)]

    def _adapter(self, epoch: int) -> list[File]:
        students, found = self.experiment.source, self.trained
        state = found.epochs[epoch]
        needed(state)
        files = [_verified(state, name) for name in (WEIGHTS, CONFIG, FILE)]
        teacher = self.student.parents[0]
        size, trait = students.source.split(teacher.name)
        record = {
            "digest": self.student.digest,
            "cell": self.student.name,
            "run_id": students.run_number,
            "seed": students.seed_used,
            "epoch": epoch,
            "losses": found.losses[:epoch],
            "sha256": {file.path: file.sha256 for file in files},
            "numbers": {"digest": teacher.digest, "contents": contents(teacher)},
            "part": students.parts[self.student.index][2] or "all valid rows",
            "made": made_by(state),
            **({"preference": said} if (said := self.said.get(epoch)) else {}),
            "experiment": students.model_dump(mode="json"),
        }
        numbers = self.id(Item("dataset")) if self.experiment.numbers else ""
        what = Item("adapter" if epoch == students.epochs else "epoch", epoch)
        about = Adapter(self.id(what), size, trait, students.source.sizes[size], numbers, students, record)
        return [*files, *_said(record, adapter_card(about, self.experiment.license))]


def _shown(tally: Tally, place: int) -> dict[str, object]:
    """As JSON has it: an interval over questions takes several of them."""
    rate = rate_of(tally.hits[DEFAULT][place], tally.answers)
    interval = None if any(map(math.isnan, rate.clustered)) else rate.clustered
    return {"hits": rate.hits, "answers": rate.answers, "share": rate.share, "interval": interval}


def made_by(piece: Piece) -> dict[str, object]:
    """By what, as its marker says; on which machine is nobody else's business."""
    return {"device": piece.made.device, "code": piece.made.code, "versions": dict(piece.made.versions)}


def _said(record: Mapping[str, object], card: str) -> list[File]:
    return [from_bytes(PROVENANCE, json_bytes(record)), from_bytes(CARD, card.encode())]


def _verified(state: Folder, name: str) -> File:
    path = state.folder / name
    try:
        found = from_disk(name, path)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); run `make verify` of the students") from None
    if found.sha256 != next(file.sha256 for file in state.files if file.path == name):
        raise UserError(f"{path} has changed since it was written; run `make verify` of the students")
    return found
