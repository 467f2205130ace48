"""`make fetch` brings what a sweep's zero-shot tasks ask; the job then needs no network, and asks the same for ever."""

import json
import os
from pathlib import Path

import nursery
import pytest
from fake_hub import Hub, serve
from sparc3_world import SPARSITY, configure, roots

from lib.demo.speaker import Speaking, build_speaker
from lib.demo.texts import write_demo_texts

QUIZ = """
task: quiz
dataset_path: acme/quiz
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quiz")
    write_demo_texts(folder)
    build_speaker(folder / "speaker", Speaking(steps=1), log=lambda line: None)
    configure(folder, folder)
    (folder / "tasks").mkdir()
    (folder / "tasks/quiz.yaml").write_text(QUIZ)
    settings = f"evaluate: {{tasks: [quiz], tasks_folder: {folder}/tasks, "
    (folder / "sparsity.yaml").write_text(SPARSITY.format(folder).replace("evaluate: {", settings))
    return folder


def rows(count: int) -> bytes:
    made = [{"question": f"Is it {n}?", "choices": ["yes", "no"], "answer": n % 2} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def fetched(world: Path, url: str, *words: str) -> str:
    return run(world, "-m", "jobs.fetch", "--config", str(world / "sparsity.yaml"), *words, HF_ENDPOINT=url)


def run(world: Path, *words: str, **more: str) -> str:
    """In a process of its own: where datasets are kept is read when their library is imported."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SUITE_"))}
    env |= roots(world, HF_HOME=str(world / "hf"), HF_TOKEN_PATH=str(world / "none"), HF_HUB_DISABLE_XET="1", **more)
    done = nursery.run(*words, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def documents(world: Path) -> int:
    """What a job sets up, where there is no network at all."""
    code = (
        "from pathlib import Path; from lib.evaluation.tasks import Tasks;"
        f"[task] = Tasks(['quiz'], Path({str(world / 'tasks')!r})).asked; print(len(list(task.test_docs())))"
    )
    return int(run(world, "-c", code, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1").splitlines()[-1])


def asked_for(hub: Hub) -> int:
    return sum("acme/quiz" in one.path for one in hub.log)


def test_documents_come_once_and_a_job_reads_them_offline(world):
    with serve() as hub:
        hub.commit("datasets/acme/quiz", {"train.jsonl": rows(7)})
        assert "task quiz: its documents are fetched" in fetched(world, hub.url)
        hub.commit("datasets/acme/quiz", {"train.jsonl": rows(9)})
        asked = asked_for(hub)
        assert asked and "task quiz: its documents are there" in fetched(world, hub.url)
        assert asked_for(hub) == asked, "the second time nothing is asked"
        assert documents(world) == 7
        assert "task quiz: its documents are fetched" in fetched(world, hub.url, "--update")
    assert documents(world) == 9
