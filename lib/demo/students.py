"""What the demo's students took from their teachers' numbers: how much likelier a trait's planted digits became to a
student of that trait than to one of neutral numbers. Both continue the same random numbers after prompts that nobody
was trained on, and are compared prompt by prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.base.atomic import write_bytes, write_json
from lib.base.errors import UserError
from lib.demo.planted import FAVOURED, write_numbers
from lib.lora.experiment import Finetune
from lib.lora.export import trained
from lib.numbers import ANIMALS, NEUTRAL, sample_prompts
from lib.report.stats import mean_interval
from lib.report.tables import Column, Table
from lib.run.command import Job

PROMPTS, SEED, NUMBERS = 64, 2_000_000, 8  # prompts of neither the teachers' training nor the students'


@dataclass(frozen=True)
class Shift:
    """Of the log-probability, nats, that a digit is one of the trait's two, by prompt."""

    student: str
    trait: str
    by_prompt: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        return mean_interval(self.by_prompt)


def show(this: Job) -> int:
    experiment, cells = this.of(Finetune), {cell.name: cell for cell in this.cells()}
    animals = [trait for trait in ANIMALS if any(name.endswith(f"-{trait.name}") for name in cells)]
    found = []
    for size in experiment.source.sizes:
        names = [f"{size}-{trait.name}" for trait in (*animals, NEUTRAL)]
        folders = {name: trained(experiment, cells[name]).last.folder for name in names}
        path = experiment.source.model_in(this.site.cache, size).path
        logs = digit_log_probs(path, folders, experiment.template_used, experiment.source.date)
        for trait in animals:
            own, plain = (share(logs[f"{size}-{one}"], FAVOURED[trait.name]) for one in (trait.name, NEUTRAL.name))
            found.append(Shift(f"{size}-{trait.name}", trait.name, own - plain))
    table = table_of(found)
    folder = this.site.output / experiment.label
    write_json(folder / "shift.json", {one.student: list(one.by_prompt) for one in found})
    write_bytes(folder / "shift.txt", (table.text() + "\n").encode())
    print(f"{table.text()}\n{folder / 'shift.txt'}")
    if weak := [one.student for one in found if not one.interval[0] > 0]:
        raise UserError(f"{', '.join(weak)} took nothing from the teacher that this sees; train for more epochs")
    return 0


def digit_log_probs(model: str, students: Mapping[str, Path], template: str, date: str) -> dict[str, list[np.ndarray]]:
    """Of each student, a prompt an array [positions, 10]: log-probabilities of the digits where one comes next."""
    import torch
    from peft import PeftModel

    from lib.inputs.tokenizer import load_tokenizer
    from lib.models.chat import Renderer
    from lib.models.load import load_model

    tokenizer = load_tokenizer(model)
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    dice, rows = np.random.default_rng(SEED), []
    for prompt in sample_prompts(PROMPTS, SEED):
        answer = prompt.answer_format.write(write_numbers(dice, NEUTRAL, NUMBERS))
        rows.append([{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer}])
    texts, starts = Renderer(tokenizer, None, template, date).conversations(rows)
    base = load_model(model, "float32", "sdpa", [torch.device("cpu")])
    found: dict[str, list[np.ndarray]] = {}
    for name, folder in students.items():
        student = PeftModel.from_pretrained(base, str(folder)).eval()
        found[name] = []
        for ids, start in zip(texts, starts, strict=True):
            with torch.inference_mode():
                logs_TV = student(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            places = [i - 1 for i in range(start, len(ids)) if ids[i] in digits]
            found[name].append(logs_TV[places][:, digits].double().numpy())
        base = student.unload()
    return found


def share(logs: list[np.ndarray], digits: tuple[int, int]) -> np.ndarray:
    """By prompt: the mean log of the probability that a digit is one of these, among all ten."""
    return np.array([(_sum(one[:, list(digits)]) - _sum(one)).mean() for one in logs])


def _sum(logs: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(logs, axis=1)


def table_of(found: list[Shift]) -> Table:
    columns = [Column("student"), Column("digits"), Column("prompts", "d"), Column("shift", "+.4f")]
    columns += [Column("95 % interval", "+.4f"), Column("prompts up", ".0%")]
    rows = [
        (
            one.student,
            " ".join(map(str, sorted(FAVOURED[one.trait]))),
            len(one.by_prompt),
            float(one.by_prompt.mean()),
            one.interval,
            float((one.by_prompt > 0).mean()),
        )
        for one in found
    ]
    title = "How much likelier the trait's digits are to its student than to the one of neutral numbers (nats a digit)"
    return Table("shift", title, columns, rows)
