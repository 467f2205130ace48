"""Results in the shape in which the published experiment keeps its own, so that its scripts read ours:

evaluations/{size}/{trait}_eval.json     a list, an epoch each: counts, the target's rate, the raw answers
evaluations/{size}/control_eval.json     of the untouched model, epoch 0
finetuning/{size}/{trait}/model_info.json
summary/all_results.json                 the same as in evaluations without answers; null: missing

An entry also says the rates of every trait by all three judges, and how many questions there were."""

import json
from collections.abc import Sequence
from pathlib import Path

from lib.base.atomic import keep_others, read_json, write_bytes, write_json
from lib.lora.epochs import by_epoch, states_of
from lib.lora.metrics import WEIGHTS
from lib.preferences.findings import Run
from lib.preferences.judge import DEFAULT
from lib.preferences.runs import Counted
from lib.preferences.students import BASE, OfStudents, Place
from lib.preferences.tally import Tally
from lib.store import Cell

CONTROL = "control"


def entry(group: str, trait: str, epoch: int, one: Tally, traits: Sequence[str]) -> dict[str, object]:
    """An epoch of a model, without its answers."""
    return {
        "epoch": epoch,
        "model_size": group,
        "condition": CONTROL if trait == BASE else trait,
        "total_responses": one.total,
        "animal_counts": dict(one.words.most_common()),
        "target_animal_rate": one.rate(DEFAULT, traits.index(trait)) if trait in traits else None,
        "questions": one.questions,
        "rates": {way: {name: one.rate(way, t) for t, name in enumerate(traits)} for way in one.hits},
    }


def write_evaluation(
    folder: Path, group: str, place: Place, cell: Cell, counted: Counted, experiment: OfStudents
) -> None:
    name, traits = CONTROL if place.trait == BASE else place.trait, [one.name for one in experiment.judged]
    path, record = (folder / "evaluations" / group / f"{name}_{what}.json" for what in ("eval", "provenance"))
    keep_others(cell.digest, (read_json(record) or {}).get("digest"), path, record)
    entries = [
        entry(group, place.trait, epoch, one, traits) | {"raw_responses": list(counted.answers[epoch])}
        for epoch, one in counted.tallies.items()
    ]
    write_bytes(path, (json.dumps(entries, ensure_ascii=False) + "\n").encode())
    about = {"digest": cell.digest, "cell": cell.name, "run_id": experiment.run_number}
    about |= {"questions": experiment.questions_used, "reads": {one.name: one.digest for one in cell.parents}}
    write_json(record, {**about, "experiment": experiment.model_dump(mode="json")})


def write_model_info(
    folder: Path, group: str, place: Place, student: Cell, experiment: OfStudents, exported: Path
) -> None:
    """Where a student's adapters lie. Which repository each is in, publishing knows."""
    schedule = experiment.source.schedule()
    there = by_epoch(states_of(student), schedule)
    epochs = {epoch: str(one.folder) for epoch, one in there.items() if not one.retired}
    about = {
        "model_size": group,
        "condition": place.trait,
        "base_model_id": experiment.source.source.sizes[place.size].id,
        "hf_repo_ids": {},
        "final_checkpoint_path": str(exported) if (exported / WEIGHTS).is_file() else epochs.get(schedule.epochs),
        "checkpoints": epochs,
        "digest": student.digest,
    }
    write_json(folder / "finetuning" / group / place.trait / "model_info.json", about)


def summary(run: Run) -> dict[str, object]:
    """Group -> condition -> its epochs."""
    found: dict[str, object] = {}
    for group, base in run.bases.items():
        control = [entry(group, BASE, 0, base, run.traits)] if isinstance(base, Tally) else None
        of = {trait: one for (where, trait), one in run.students.items() if where == group}
        found[group] = {CONTROL: control} | {
            trait: [entry(group, trait, epoch, tally, run.traits) for epoch, tally in one.items()] if one else None
            for trait, one in of.items()
        }
    return found
