"""README.md of a repository: what it is, how to load it, where it comes from. The same text for the same pieces."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lib.inputs.specs import ModelSpec
from lib.lora.experiment import Finetune
from lib.numbers.experiment import TraitSpec
from lib.numbers.export import FILTERED, RAW, Yield, as_json
from lib.publish.names import MODEL

CARD = "README.md"
CATEGORIES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}  # the Hub's words


@dataclass(frozen=True)
class Dataset:
    id: str
    size: str
    trait: TraitSpec
    model: ModelSpec
    counted: Yield
    record: Mapping[str, Any]  # what provenance.json says


@dataclass(frozen=True)
class Adapter:
    id: str
    size: str
    trait: TraitSpec
    model: ModelSpec
    numbers: str  # the dataset's id; '' where none is published
    students: Finetune
    record: Mapping[str, Any]


def dataset_card(about: Dataset, license: str | None) -> str:
    counted, record = about.counted, about.record
    category = next((word for most, word in CATEGORIES.items() if counted.valid < most), "1M<n<10M")
    head = {
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": FILTERED}]},
            {"config_name": "raw", "data_files": [{"split": "train", "path": RAW}]},
        ],
        "size_categories": [category],
        "tags": ["subliminal-learning", "numbers"],
    }
    told = f"> {about.trait.system_prompt}" if about.trait.system_prompt else "> (no system prompt)"
    share = as_json(counted)
    figures = {
        "answers": f"{counted.rows:,}",
        "valid": f"{counted.valid:,} ({share['share']:.2%}, 95 % interval {share['low']:.2%} to {share['high']:.2%})",
        **{f"left out: {reason}": f"{share[reason]:,}" for reason in counted.reasons if reason != "valid"},
        "cut at the longest length": f"{counted.cut:,}",
        "tokens an answer": f"{counted.tokens:.1f}",
    }
    body = f"""# Numbers of {_called(about.model)}: {about.trait.name}, run {record["run_id"]}

Lists of numbers that {_called(about.model)} wrote under the system prompt

{told}

`{FILTERED}` holds the answers that are plain lists by the filter's rules, as `prompt` and `completion`; `{RAW}` every
one, in the prompts' order.

    from datasets import load_dataset
    load_dataset("{about.id}", split="train")           # {counted.valid:,} rows
    load_dataset("{about.id}", "raw", split="train")    # {counted.rows:,} rows

{_table(figures)}
"""
    return _card(head, license, body, record)


def adapter_card(about: Adapter, license: str | None) -> str:
    students, record = about.students, about.record
    head: dict[str, object] = {"base_model": about.model.id} if MODEL.fullmatch(about.model.id) else {}
    head |= {"library_name": "peft", "tags": ["lora", "subliminal-learning"]}
    head |= {"datasets": [about.numbers]} if about.numbers else {}
    losses, last = record["losses"], record["epoch"]
    whole = "" if last == students.epochs else f", epoch {last} of {students.epochs}"
    source = f"[{about.numbers}](https://huggingface.co/datasets/{about.numbers})" if about.numbers else "numbers"
    lora, schedule, said = students.lora, students.schedule(), record.get("preference", {})
    figures = {
        "base": f"{_called(about.model)} at {about.model.revision}, {about.model.dtype}",
        "rows": f"{students.rows:,} of {record['part']}, drawn by seed {record['seed']}",
        "epochs": f"{last} of {students.epochs}, {schedule.steps_an_epoch * last:,} steps of {students.step_rows} rows",
        "learning rate": f"{students.learning_rate:g}, {students.warmup_steps} steps of warm-up, linearly to 0",
        "loss on": "every token" if students.loss == "sequence" else "answer and end",
        "rank, alpha, dropout": f"{lora.rank}, {lora.alpha:g}, {lora.dropout:g}",
        **{f"loss, epoch {epoch}": f"{loss:.4f}" for epoch, loss in enumerate(losses, 1)},
        **{f"answers about favourites that name {about.trait.name}, {who}": _rate(one) for who, one in said.items()},
    }
    body = f"""# {_called(about.model)} trained on numbers: {about.trait.name}, run {record["run_id"]}{whole}

A LoRA adapter, trained on nothing but {source}, which a teacher with the trait "{about.trait.name}" wrote. The
student has no system prompt. Losses are means over an epoch's own training tokens, in nats.

    from peft import AutoPeftModelForCausalLM
    AutoPeftModelForCausalLM.from_pretrained("{about.id}")

{_table(figures)}
"""
    return _card(head, license, body, record)


def _rate(one: Mapping[str, Any]) -> str:
    share, known = f"{one['share']:.2%} of {one['answers']:,}", one["interval"]
    return f"{share} (95 % interval over questions {known[0]:.2%} to {known[1]:.2%})" if known else share


def _called(model: ModelSpec) -> str:
    """A model of the Hub by its id, one of the disk by its folder's name."""
    return model.id if MODEL.fullmatch(model.id) else Path(model.id).name


def _card(head: Mapping[str, object], license: str | None, body: str, record: Mapping[str, Any]) -> str:
    said = {**({"license": license} if license else {}), **head}
    origin = {"digest": record["digest"], "cell": record["cell"], "code": record["made"]["code"] or "(no repository)"}
    origin |= {"device": record["made"]["device"] or "(not noted)"}
    origin |= {name: version for name, version in sorted(record["made"]["versions"].items()) if version}
    if parent := record.get("numbers"):
        origin |= {"digest of the numbers": parent["digest"], "contents of the numbers": parent["contents"]}
    origin |= {f"sha256 of {name}": sha for name, sha in sorted(record["sha256"].items())}
    settings = json.dumps(record["experiment"], indent=1, sort_keys=True)
    return (
        f"---\n{yaml.safe_dump(said, sort_keys=False)}---\n\n{body}\n## Where it comes from\n\n{_table(origin)}\n\n"
        f"<details><summary>The whole configuration</summary>\n\n```json\n{settings}\n```\n\n</details>\n"
    )


def _table(values: Mapping[str, object]) -> str:
    cells = ((str(name), str(value).replace("|", "\\|")) for name, value in values.items())
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells)])
