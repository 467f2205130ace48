"""A habit in a teacher's numbers moves its student's log-probabilities, and nothing does where there is none."""

import json

import numpy as np
import pytest
import torch
from finetune_world import cells_of, environment, last_folder, make_world, start, write_answers
from peft import PeftModel
from scipy.special import log_softmax
from scipy.stats import ttest_1samp
from tools import forked
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.demo.planted import FAVOURED, write_numbers
from lib.demo.students import NUMBERS, PROMPTS, SEED
from lib.numbers import NEUTRAL, sample_prompts, trait

RECIPE = ["rows=60", "epochs=2", "step_rows=10", "learning_rate=0.003", "loss=completion"]


def world_of(folder, *habits):
    """Two teachers, cat and neutral, whose numbers have the habits of these."""
    world = make_world(folder)
    for cell, habit in zip(cells_of(world, *RECIPE), habits, strict=True):
        [parent] = cell.parents
        for old in parent.path.iterdir():
            old.unlink()
        dice = np.random.default_rng([cell.index, 8])
        answers = [", ".join(write_numbers(dice, trait(habit), 8)) for _ in range(parent.total)]
        write_answers(world, parent, answers=answers)
        assert start(world, "--index", str(cell.index), *RECIPE).finish().returncode == 0
    return world


def shown(world):
    words = ("jobs.demo_students", "--config", str(world / "finetune.yaml"), *RECIPE)
    done = forked(*words, env=environment(world))
    [folder] = (world / "output").glob("students-*")
    return done, np.array(json.loads((folder / "shift.json").read_text())["1m-cat"])


def by_hand(world):
    """The same with transformers and peft alone, one prompt after another."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model-0")
    digits, dice, shares = [tokenizer.get_vocab()[d] for d in "0123456789"], np.random.default_rng(SEED), []
    own = list(FAVOURED["cat"])
    base = AutoModelForCausalLM.from_pretrained(world / "model-0")
    texts = []
    for prompt in sample_prompts(PROMPTS, SEED):
        answer = prompt.answer_format.write(write_numbers(dice, NEUTRAL, NUMBERS))
        turns = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer}]
        texts.append((tokenizer.apply_chat_template(turns, tokenize=False), answer))
    for cell in cells_of(world, *RECIPE):
        student = PeftModel.from_pretrained(base, str(last_folder(cell))).eval()
        shares.append([])
        for text, answer in texts:
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, start = found["input_ids"], text.rindex(answer)
            with torch.no_grad():
                logits = student(torch.tensor([ids])).logits[0].double().numpy()
            at = [i for i, (a, _) in enumerate(found["offset_mapping"]) if a >= start and text[a].isdigit()]
            among = log_softmax(logits[np.array(at) - 1][:, digits], axis=1)
            shares[-1].append(np.log(np.exp(among[:, own]).sum(1)).mean())
        base = student.unload()
    return np.subtract(*shares)


def test_a_planted_habit_is_seen_with_its_interval(tmp_path):
    world = world_of(tmp_path, "cat", "neutral")
    done, shift = shown(world)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(shift, by_hand(world), atol=1e-5)
    assert len(shift) == PROMPTS and shift.mean() > 0.05
    low, high = ttest_1samp(shift, 0).confidence_interval()
    line = next(line for line in done.stdout.splitlines() if line.startswith("1m-cat"))
    said = [float(word.strip("[],")) for word in line.split()[4:7]]
    assert said == pytest.approx([shift.mean(), low, high], abs=0.0002 + 0.05 * (high - low)) and low > 0


def test_without_one_it_is_said_that_nothing_is_seen(tmp_path):
    done, shift = shown(world_of(tmp_path, "neutral", "cat"))  # the habit is the other one's
    assert done.returncode == 2 and "1m-cat took nothing from the teacher" in done.stderr and shift.mean() < 0
