"""What the tests of publishing share: students that are done without a training, a Hub on this machine, the job."""

import ctypes
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import Hub as FakeHub
from fake_hub import serve
from finetune_world import cells_of, environment, last_folder, make_world, students
from preferences_world import LOGPROBS, PREFERENCES
from safetensors.numpy import save_file
from tools import Fork, module_work

import lib.publish.kernel  # noqa: F401  (before the forks, which then need not)
from lib.families import load
from lib.lora.metrics import CONFIG, STATE, WEIGHTS, Step, write_lines
from lib.preferences.experiment import Preferences
from lib.publish.experiment import Publish
from lib.publish.hub import Hub
from lib.run.extent import state_name
from lib.run.parents import read_from
from lib.store import Cell, commit, commit_folder, read_cell

TOKEN = "hf_" + "T0psecret" * 4
DATA, MODEL = "acme/qwen-2.5-1m-instruct-cat-numbers-run-5", "acme/qwen-2.5-1m-instruct-cat-ft-run-5"
REPOS = [f"datasets/{DATA}", f"models/{MODEL}"]
TITLES = ["subliminal-learning-number-datasets-run-5", "qwen-25-instruct-subliminal-learning-models-run-5"]
CONFIG_TEXT = "kind: publish\nname: out\nstudents: {config: finetune.yaml}\nrun: {cells: 8, log_seconds: 60}\n"


def make_students(folder: Path, traits: tuple[str, ...] = ("cat", "neutral")) -> Path:
    make_world(folder, traits)
    (folder / "publish.yaml").write_text(CONFIG_TEXT)
    (folder / "words.yaml").write_text(json.dumps(LOGPROBS))
    (folder / "asked.yaml").write_text(json.dumps(PREFERENCES))
    for cell in cells_of(folder):
        train(folder, cell)
    return folder


def train(folder: Path, cell: Cell) -> None:
    """A student's epochs, done: random adapters, and losses that fall."""
    schedule, dice, lines = students(folder).schedule(), np.random.default_rng(cell.index), []
    for epoch in range(1, schedule.epochs + 1):
        for number in range((epoch - 1) * schedule.steps_an_epoch + 1, epoch * schedule.steps_an_epoch + 1):
            lines.append(Step(number, epoch, 3.0 - number / 10, 1e-3, 1.0, 90, 30).line())
        tensors = {
            f"layers.{n}.lora_{m}.weight": dice.standard_normal((4, 8), np.float32) for n in (0, 1) for m in "AB"
        }

        def fill(place: Path, tensors: dict[str, np.ndarray] = tensors) -> None:
            save_file(tensors, place / WEIGHTS)
            save_file(tensors, place / STATE)
            (place / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
            write_lines(place, lines)

        made = {"rows": cell.total, "parents": read_from(cell), "host": "secret-node", "device": "H100", "code": "abc"}
        name = state_name(epoch * schedule.steps_an_epoch)
        commit_folder(cell.path, cell.digest, name, fill, made=made)


def without_roots_rights() -> None:
    """From here on a file's mode holds for root too."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


@dataclass
class World:
    """A user with a home and a token, who publishes to a Hub on this machine."""

    folder: Path
    hub: FakeHub
    places: Path  # scratch and cache, which others may share
    token: str = TOKEN
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hub.users[TOKEN] = "acme"
        self.token_file = self.folder / "token"
        if self.token:
            self.token_file.write_text(self.token)
            self.token_file.chmod(0o600)
        self.env = environment(self.places) | self.env

    def start(
        self,
        *overrides: str,
        index: int = 0,
        passing: bool = True,
        before: Callable[[], object] = lambda: None,
        **env: str,
    ) -> Fork:
        """The job, begun; `passing`: over its waits, and it says how long they were. `before`: done in its process."""
        words = ("--config", str(self.places / "publish.yaml"), "--index", str(index), *overrides)
        work = module_work("jobs.publish", *words, env={**self.env, "HF_TOKEN_PATH": str(self.token_file), **env})

        def patched() -> None:
            from huggingface_hub import constants

            constants.ENDPOINT, constants.HF_TOKEN_PATH = self.hub.url, str(self.token_file)
            constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *({"HF_USER_ID"} - set(env))):
                os.environ.pop(name, None)
            if passing:
                Hub.wait = lambda self, seconds: (print(f"slept {seconds:.0f}", flush=True), time.sleep(0.05))
            before()
            work()

        return Fork(patched)

    def publish(self, *overrides: str, index: int = 0, code: int = 0, **env: str) -> str:
        """What the job says; the log of requests begins with it."""
        self.hub.log.clear()
        done = self.start(*overrides, index=index, **env).finish()
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def experiment(self, *overrides: str) -> Publish:
        found = load(self.places / "publish.yaml", list(overrides))
        assert isinstance(found, Publish)
        return found

    def cell(self, *overrides: str, index: int = 0) -> Cell:
        return self.experiment(*overrides).cells(self.places / "cache", self.places / "scratch")[index]

    def rows(self, *overrides: str, index: int = 0) -> dict[str, list]:
        schema = self.experiment(*overrides).schema(self.places / "cache")
        found = read_cell(self.cell(*overrides, index=index), schema, schema)
        return {name: list(values) for name, values in found.items()}

    def ask(self, name: str, *overrides: str, parents: dict[str, str] | None = None) -> None:
        """A cell of preferences, done: a student names a cat at as many questions as it has epochs, the base once."""
        experiment = load(self.places / "asked.yaml", list(overrides))
        assert isinstance(experiment, Preferences)
        schema, asked, each = experiment.schema(self.places), len(experiment.questions_used), experiment.per_question
        cells = experiment.cells(self.places / "cache", self.places / "scratch")
        cell = next(one for one in cells if one.name == name)
        rows = [(e, q, n) for e in experiment.epochs_of(name) for q in range(asked) for n in range(each)]
        columns = {key: np.array([row[at] for row in rows]) for at, key in enumerate(("epoch", "question", "number"))}
        names = [q < e if e else q + n == 0 for e, q, n in rows]
        columns |= {key: np.ones(len(rows)) for key in ("tokens", "ended")}
        columns["answer"] = ["A cat." if one else "Nothing." for one in names]
        made = {"rows": cell.total, "parents": parents or read_from(cell)}
        commit(cell.path, cell.digest, 0, cell.total, schema, columns, made=made)

    def file(self, name: str) -> bytes:
        """Of the first student's last epoch."""
        return (last_folder(cells_of(self.places)[0]) / name).read_bytes()

    def held(self) -> dict[str, set[str]]:
        """Title -> what the collection holds."""
        found = self.hub.collections.values()
        return {one["title"]: {f"{i['type']}s/{i['id']}" for i in one["items"]} for one in found}

    def must_be_whole(self) -> None:
        """Each repository was made once, got one commit, and each large file was sent once."""
        hub = self.hub
        assert hub.created == REPOS and [repo for repo, _ in hub.committed] == REPOS
        weights = hub.files_now(REPOS[1])[WEIGHTS]
        assert hub.stored_bytes == len(weights) and weights == self.file(WEIGHTS)
        assert self.held() == {title: {repo} for title, repo in zip(TITLES, REPOS, strict=True)}


def fixtures() -> tuple[Any, Any]:
    """Of a test file that says `made, world = fixtures()`: students, and for each test a world with a copy of them."""

    @pytest.fixture(scope="module")
    def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make_students(tmp_path_factory.mktemp("students"))

    @pytest.fixture
    def world(made: Path, tmp_path: Path) -> Iterator[World]:
        with copied(made, tmp_path) as found:
            yield found

    return made, world


@contextmanager
def copied(made: Path, folder: Path) -> Iterator[World]:
    """Students of one's own, and a Hub of one's own."""
    places = shutil.copytree(made, folder / "places")
    with serve() as hub:
        yield World(folder, hub, places)
