"""What must not be believed: students that became others while they were asked, adapters that are none, engines that
say NaN or compute with half an adapter. One sentence each, and what was asked before stays."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import wait_until
from finetune_world import cells_of as students_of
from finetune_world import environment
from preferences_world import begin, cells_of, columns, finished, make_world, with_words
from safetensors.torch import load_file, save_file
from tools import in_fork

from lib.base.errors import UserError
from lib.families import load
from lib.lora.epochs import states_of
from lib.lora.metrics import CONFIG, WEIGHTS
from lib.models.engine import Adapter, Sampling, Setting, Work
from lib.models.engine_transformers import TransformersEngine
from lib.models.merged import Merging
from lib.preferences.adapters import adapters_of
from lib.preferences.ask_kernel import AskLine
from lib.preferences.proof import References
from lib.preferences.score_kernel import ScoreKernel
from lib.run.command import job
from lib.run.parents import read_from
from lib.run.site import site
from lib.store import Cell, commit_folder, scan


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return with_words(make_world(tmp_path_factory.mktemp("faults")))


@pytest.fixture
def copy(world, tmp_path):
    """Its scratch may be changed."""
    for path in world.iterdir():
        if path.name != "scratch":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(world / "scratch", tmp_path / "scratch")
    return tmp_path


def student(folder: Path, name: str) -> Cell:
    return next(cell for cell in students_of(folder) if cell.name == name)


def train_again(cell: Cell, change, only: int | None = None) -> None:
    """The same cell with other adapters, as a training elsewhere would have left them; `only`: of this state."""
    for number, state in enumerate(states_of(cell)):
        tensors = load_file(state.folder / WEIGHTS)
        changed = change(tensors) if only in (None, number) else tensors

        def fill(folder: Path, state=state, changed=changed) -> None:
            shutil.copytree(state.folder, folder, dirs_exist_ok=True)
            save_file(changed, folder / WEIGHTS)

        kept = commit_folder(cell.path, cell.digest, state.name, fill)
        assert kept.sha256 != state.sha256 or changed is tensors


def stronger(tensors):
    return {name: tensor * (1.01 if "lora_B" in name else 1) for name, tensor in tensors.items()}


def one_sentence(done) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_student_trained_again_between_two_batches_is_not_asked_on(copy, monkeypatch):
    """Its log-probabilities were read again too, so every adapter is what it should be; all is asked anew."""
    own, cell, real = student(copy, "1m-cat"), cells_of(copy, "asked")["1m-cat"], AskLine.begin

    def second_of_another(line, of, start, stop):
        if start:
            train_again(own, stronger)
            shutil.rmtree(cells_of(copy, "words")["1m-cat"].path)
            finished(begin(copy, "words", "--index", "1"))
        return real(line, of, start, stop)

    monkeypatch.setattr(AskLine, "begin", second_of_another)
    said = one_sentence(begin(copy, "asked", "--index", "1").finish())
    assert "another copy of students_run5/1m-cat, words_run5/1m-cat was made while asked_run5/1m-cat was asked" in said
    assert [one.stop for one in scan(cell.path, cell.digest)[0]] in ([], [48])
    monkeypatch.undo()
    finished(begin(copy, "asked", "--index", "1"))
    shards = scan(cell.path, cell.digest)[0]
    assert [one.rows for one in shards] == [48, 24]
    now = read_from(cell)
    assert all(one.made.parents == now for one in shards)


def test_a_student_is_not_held_against_values_of_its_other_copy(copy):
    train_again(student(copy, "1m-cat"), stronger)
    words = cells_of(copy, "words")["1m-cat"]
    said = one_sentence(begin(copy, "asked", "--index", "1").finish())
    assert f"words_run5/1m-cat was made from another copy of students_run5/1m-cat: remove {words.path}" in said


def test_a_batch_begun_ahead_of_a_student_that_was_trained_again_is_begun_anew():
    """The cell's markers will speak of the student as it is at the cell's own turn."""
    line, cell = AskLine.__new__(AskLine), Cell(0, "a", 1, "d" * 64, Path("none"))
    line.begun, line.read = {("a", 0, 1): "of the older one"}, {"a": False}
    line.turn(cell)
    assert line.begun == {} and line.read["a"].was == {}
    line.begun = {("a", 0, 1): "of this one"}
    line.turn(cell)
    assert line.begun


def test_a_student_trained_again_between_two_epochs_is_not_read_on(copy, monkeypatch):
    own, real = student(copy, "1m-cat"), ScoreKernel.prepare
    words = cells_of(copy, "words")["1m-cat"]
    shutil.rmtree(words.path)

    def second_of_another(kernel, start, stop):
        if start:
            train_again(own, stronger)
        return real(kernel, start, stop)

    monkeypatch.setattr(ScoreKernel, "prepare", second_of_another)
    said = one_sentence(begin(copy, "words", "--index", "1").finish())
    assert "another copy of students_run5/1m-cat was made while words_run5/1m-cat was asked" in said
    monkeypatch.undo()
    finished(begin(copy, "words", "--index", "1"))
    assert all(one.made.parents == read_from(words) for one in scan(words.path, words.digest)[0])


LAYER = "base_model.model.model.layers.0.mlp.up_proj.lora_"
BROKEN = {
    "NaN": (lambda t: {**t, f"{LAYER}B.weight": t[f"{LAYER}B.weight"] * torch.nan}, "or its adapter holds NaN"),
    "rank": (lambda t: {**t, f"{LAYER}A.weight": t[f"{LAYER}A.weight"][:2].clone()}, "has the shape (2, "),
    "module": (lambda t: {**t, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 4)}, "has no place for"),
    "half": (lambda t: {n: x for n, x in t.items() if n != f"{LAYER}A.weight"}, "only one of two matrices of model."),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_adapter_that_is_none_is_not_read_and_the_epochs_before_it_stay(copy, how):
    """Its manifest is right: it was trained so."""
    change, says = BROKEN[how]
    train_again(student(copy, "1m-cat"), change, only=1)
    cell = cells_of(copy, "words")["1m-cat"]
    shutil.rmtree(cell.path)
    assert says in one_sentence(begin(copy, "words", "--index", "1").finish())
    assert [one.stop for one in scan(cell.path, cell.digest)[0]] == [6]


def test_a_changed_config_or_another_students_folder_is_not_believed(copy):
    cat, neutral = (states_of(student(copy, name))[0].folder for name in ("1m-cat", "1m-neutral"))
    shutil.rmtree(cells_of(copy, "words")["1m-cat"].path)
    path = cat / CONFIG
    whole = path.read_text()
    path.write_text(whole.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert path.read_text() != whole
    assert f"{path} has changed since it was written" in one_sentence(begin(copy, "words", "--index", "1").finish())
    path.write_text(whole)
    (cat / WEIGHTS).write_bytes((neutral / WEIGHTS).read_bytes())
    assert f"{cat / WEIGHTS} has changed" in one_sentence(begin(copy, "words", "--index", "1").finish())


def proven(world, values, base=None):
    experiment, cell = load(world / "asked.yaml"), cells_of(world, "asked")["1m-cat"]
    references = References(experiment, 6)
    references.read(cell)
    own = references.of["1m-cat", 3]
    references.of = {("base", 0): references.of["base", 0], ("1m-cat", 3): own}
    said = [*(references.of["base", 0] if base is None else base), *values(references.of["base", 0], own)]
    keys = [("base", 0)] * 6 + [("1m-cat", 3)] * 6
    return references.proven(cell, keys, [(n, [value]) for n, value in enumerate(said)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_engine_that_says_nan_under_one_adapter_is_not_believed(world, value):
    assert proven(world, lambda base, own: own)["probe_off"] == 0
    with pytest.raises(UserError, match="under 1m-cat, epoch 3 are not finite; nothing of this batch is kept"):
        proven(world, lambda base, own: [*own[:5], value])


def test_half_an_adapter_is_not_the_adapter(world):
    """Nearest to its own, and far from it."""
    for share in (0.6, 1.5, 2.83):
        with pytest.raises(UserError, match=r"epoch 3: .* from that adapter's, which itself moves the base's by"):
            proven(world, lambda base, own, share=share: base + share * (own - base))
    assert proven(world, lambda base, own: own + 0.01)["probe_off"] == pytest.approx(0.01)


def test_after_an_adapter_that_cannot_be_loaded_the_next_is_worn(world, tmp_path):
    experiment = load(world / "asked.yaml")
    path, how = experiment.source.source.sizes["1m"].id, Sampling(0.0, 4, (2,))
    one, two = adapters_of(student(world, "1m-cat"), experiment.source.schedule(), [1, 3]).values()
    engine = TransformersEngine(Setting(path, "float32", 4, 128, rank=4))

    def said(adapter):
        return engine.begin(Work([[5, 6, 7, 8]] * 2, how, [0, 1], [adapter] * 2))().answers

    expected = {adapter: said(adapter) for adapter in (one, two, None)}
    shutil.copytree(one.folder, tmp_path / "broken")
    (tmp_path / "broken" / WEIGHTS).write_bytes(b"no tensors")
    said(one)
    for adapter in (two, None, one):
        with pytest.raises(UserError, match="cannot be loaded"):
            said(Adapter("broken", str(tmp_path / "broken")))
        assert said(adapter) == expected[adapter]


def test_an_adapter_that_went_in_by_half_is_none_that_is_inside(world):
    """Its base's files could not be read to the end: what follows, the same adapter too, is loaded whole."""
    experiment = load(world / "asked.yaml")
    path = experiment.source.source.sizes["1m"].id
    one, two = adapters_of(student(world, "1m-cat"), experiment.source.schedule(), [1, 3]).values()
    merging = Merging(path, torch.float32, torch.device("cpu"))
    first = dict(merging.turn(one))
    next(merging.turn(two))
    again = dict(merging.turn(one))
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_sizes_of_one_model_in_two_types_share_no_decoder(world, tmp_path):
    """On a box one process takes one task after another."""
    from lib.preferences.score_kernel import load_kernel

    numbers = json.loads((world / "numbers.yaml").read_text())
    numbers["sizes"]["1m_half"] = numbers["sizes"]["1m"] | {"dtype": "bfloat16"}
    for name in ("finetune", "words"):
        (tmp_path / f"{name}.yaml").write_text((world / f"{name}.yaml").read_text())
    (tmp_path / "numbers.yaml").write_text(json.dumps(numbers))

    def work() -> None:
        os.environ.update(environment(world))
        site.cache_clear()
        this = job("score_preferences", "", load, ["--config", str(tmp_path / "words.yaml"), "--index", "0"])
        for cell in this.cells():
            if cell.name.endswith("base"):
                print(cell.name, load_kernel(this, this.experiment, cell)[0].base.decoder.dtype)

    done = in_fork(work)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if "-base " in line)
    assert said == ["1m-base torch.float32", "1m_half-base torch.bfloat16"]


def test_two_copies_at_once_and_one_killed_between_adapters_leave_what_one_leaves(copy):
    """Three epochs, a batch each."""
    how = ("generate.batch=24", "--index", "1")
    finished(begin(copy, "asked", *how))
    expected = columns(copy, "asked", "1m-cat", how[0])
    cell = cells_of(copy, "asked", how[0])["1m-cat"]
    shutil.rmtree(cell.path)
    killed, other = begin(copy, "asked", *how), begin(copy, "asked", *how)
    wait_until(lambda: any(cell.path.glob("*.json")), 60, "a batch")
    os.kill(killed.pid, signal.SIGKILL)
    killed.finish()
    assert other.finish().returncode == 0
    found = columns(copy, "asked", "1m-cat", how[0])
    assert len(scan(cell.path, cell.digest)[0]) == 3
    assert all(list(found[name]) == list(expected[name]) for name in expected)
