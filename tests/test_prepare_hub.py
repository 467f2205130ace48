"""`make fetch` of sample sets that stream from a Hub: one commit for all, recorded; what is said when it is away."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nursery
import pytest
from fake_hub import Fault, Hub, serve
from sample_sets import bos_model, made, sets

from lib.demo.texts import write_demo_texts
from lib.families import load

C4, PROMPTS, WIKI = "datasets/acme/c4", "datasets/acme/prompts", "datasets/acme/wiki"
CODE = (
    "import time; time.sleep = lambda s: None; import sys; from lib.base.errors import exit_with; "
    "from jobs.prepare_data import main; exit_with(main)"
)


def repository(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_demo_texts(folder)
    bos_model(folder / "model")
    (folder / "sets.yaml").write_text(
        f"kind: attribution\nname: sets\nmodel: {{id: {folder}/model, dtype: float32}}\nrun: {{gpus: 0}}\n"
        "data:\n  general: {id: acme/c4, config: en, seeds: [0, 1], samples: 6, tokens: 300, buffer: 40}\n"
        "  prompts: {toxic: {id: acme/prompts, samples: 20}}\n"
        "  text: {id: acme/wiki, config: wikitext-2-raw-v1}\n"
    )
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serve() as one:
        for name, part in ((C4, "c4"), (PROMPTS, "prompts"), (WIKI, "wikitext")):
            one.commit(name, repository(folder / part))
        yield one


def run(hub: Hub, folder: Path, cache: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    hub.log.clear()
    ours = ("HF_", "HUGGING", "SUITE_", "SLURM", "SBATCH", "XDG_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
        "HF_ENDPOINT": hub.url, "SUITE_SITE": "local", "SUITE_CACHE": str(cache), "OMP_NUM_THREADS": "1",
    } | env  # fmt: skip
    return nursery.run(*words, "--config", str(folder / "sets.yaml"), env=env)


def test_sets_stream_from_one_commit_and_the_second_call_asks_nothing(hub, folder, tmp_path):
    done = run(hub, folder, tmp_path, "-m", "jobs.fetch")
    assert done.returncode == 0, done.stderr
    experiment, local = load(folder / "sets.yaml"), tmp_path / "local"
    for name, repo in (("general-0", C4), ("general-1", C4), ("toxic", PROMPTS), ("text", WIKI)):
        record, found = made(experiment, tmp_path, name)
        assert record.commit == found.attributes["commit"] == hub.heads[repo] and record.facts["revision"] == "main"
        assert f"samples {name}: {hub.heads[repo][:12]}, {record.rows} rows" in done.stdout
    again = run(hub, folder, tmp_path, "-m", "jobs.fetch")
    assert again.returncode == 0 and hub.log == [] and not again.stderr

    here = sets(
        folder / "model",
        **{
            **experiment.data.model_dump(),
            "general": {**experiment.data.general.model_dump(), "id": str(folder / "c4")},
            "prompts": {"toxic": {**experiment.data.prompts["toxic"].model_dump(), "id": str(folder / "prompts")}},
            "text": {**experiment.data.text.model_dump(), "id": str(folder / "wikitext")},
        },
    )
    from lib.inputs.fetch import fetch

    fetch(here, local)
    for name in here.data.sets():
        streamed, read = made(experiment, tmp_path, name)[1], made(here, local, name)[1]
        assert [i.tolist() for i in streamed.every] == [i.tolist() for i in read.every], name

    old = hub.heads[C4]
    new = repository(folder / "c4")
    hub.commit(C4, {k: v for k, v in new.items() if "train.00000" not in k})
    fewer = "data.general.samples=5"
    assert run(hub, folder, tmp_path, "-m", "jobs.prepare_data", fewer).stdout.count(old[:12]) == 2
    for name in ("general-0", "general-1"):  # made anew, of the commit that is recorded and not of what `main` is now
        first = made(experiment, tmp_path, name)[1].source
        assert made(load(folder / "sets.yaml", [fewer]), tmp_path, name)[1].source == first[:5]
    moved = run(hub, folder, tmp_path, "-m", "jobs.prepare_data", "--update")
    assert moved.returncode == 0, moved.stderr
    assert moved.stdout.count(f": {hub.heads[C4][:12]}, 6 rows") == 2
    assert sum(r.path.startswith("/api/datasets/acme/c4/revision/main") for r in hub.log) == 1
    assert json.loads(next(tmp_path.glob("inputs/sources/acme--c4--main/source.json")).read_text())["commit"] != old


def test_what_is_not_there_is_named_and_nothing_is_left(hub, folder, tmp_path):
    assert run(hub, folder, tmp_path, "-m", "jobs.fetch", "data.general.samples=1").returncode == 0
    for words, env, says in (
        (["data.general.id=acme/none"], {}, "dataset acme/none at main: access is refused; check the id"),
        (["data.general.revision=v9"], {}, "dataset acme/c4 at v9: there is no such thing on the Hub"),
        (["data.general.config=fr"], {}, "'fr' not found. Available: ['en']; check the config"),
        (["data.general.samples=2"], {"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE and run `make fetch CONFIG="),
        (["--update"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "` again, on a node with a network"),
    ):
        done = run(hub, folder, tmp_path, "-c", CODE, *words, **env)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ") and says in line, line
    hub.faults = [Fault("c4-train", status=500)]
    done = run(hub, folder, tmp_path, "-c", CODE, "data.general.samples=3")
    assert done.returncode == 2 and "run `make fetch CONFIG=" in done.stderr.splitlines()[-1], done.stderr
    assert len(list(tmp_path.glob("inputs/samples/general-*"))) == 2
