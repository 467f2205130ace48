"""`python -m jobs.fetch` against a small Hub on this machine, with the real huggingface_hub and datasets libraries."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import nursery
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, wait_until
from fake_hub import Fault, Hub, serve
from safetensors.numpy import save
from tools import number_rows, tiny_model

from lib.base.errors import UserError
from lib.base.turns import one_at_a_time
from lib.families import load
from lib.inputs import hub as hub_client
from lib.inputs.records import model_input
from lib.store import gaps, scan

MODEL, PARQUET, JSONL = "models/acme/tiny", "datasets/acme/cat", "datasets/acme/dog"
TOKEN = "hf_" + "T0psecret" * 4
# the waits between two tries are the libraries' and ours; how long they are is not tested
IMPATIENT = (
    "import time; time.sleep = lambda s: None; from lib.base.errors import exit_with; from jobs.fetch import main;"
)


def pairs(seed: int, n: int = 6) -> list[dict[str, str]]:
    rows = [row["messages"] for row in number_rows(n, seed)]
    return [{"prompt": user["content"], "completion": answer["content"]} for user, answer in rows]


def parquet(rows: list[dict[str, str]]) -> dict[str, bytes]:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return {"README.md": b"---\nlicense: mit\n---\n", "data/train-00000-of-00001.parquet": out.getvalue()}


def jsonl(rows: list[dict[str, str]]) -> dict[str, bytes]:
    return {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


def messages(rows: list[dict[str, str]]) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in rows
    ]


@dataclass
class Box:
    """A user with a home, a cache and a token's file, and an experiment of two cells on the Hub."""

    folder: Path
    hub: Hub
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache, self.config, home = self.folder / "cache", self.folder / "small.yaml", self.folder / "home"
        home.mkdir()
        (home / "token").write_text(TOKEN)
        (home / "token").chmod(0o600)
        self.config.write_text(
            "kind: lls\nname: small\nmodel: {id: acme/tiny, dtype: float32}\ntraits: [cat, dog]\n"
            "system_prompt: You love {trait}s.\ndataset: {id: 'acme/{trait}'}\n"
            "score: {batch_tokens: 2048, head_rows: 64}\nrun: {gpus: 0}\n"
        )
        ours = ("HF_", "HUGGING", "SUITE_", "SLURM", "SBATCH", "XDG_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
            "HOME": str(home), "HF_TOKEN_PATH": str(home / "token"), "HF_ENDPOINT": self.hub.url, "SUITE_SITE": "local",
            "SUITE_CACHE": str(self.cache), "SUITE_SCRATCH": str(self.folder / "scratch"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return nursery.run(*arguments, "--config", str(self.config), env=self.env | env)

    def fetch(self, *arguments: str, **env: str) -> str:
        self.hub.log.clear()
        done = self.run("-m", "jobs.fetch", *arguments, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fails(self, *arguments: str, **env: str) -> str:
        """The one line that says why."""
        done = self.run("-c", f"{IMPATIENT} exit_with(main)", *arguments, **env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ") and done.stderr.count("error: ") == 1
        return line

    def record(self, kind: str) -> dict:
        return json.loads(next((self.cache / "inputs" / kind).glob("*/input.json")).read_text())

    def rows(self, name: str) -> list[dict]:
        path = self.cache / "inputs" / "datasets" / f"acme--{name}--main--train" / "rows.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"pytorch_model.bin": b"not wanted"}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serve() as one:
        one.commit(MODEL, files)
        one.commit(PARQUET, parquet(pairs(0)))
        one.commit(JSONL, jsonl(pairs(1)))
        yield one


@pytest.fixture
def box(hub: Hub, tmp_path: Path) -> Box:
    return Box(tmp_path, hub)


def test_everything_comes_and_the_second_call_asks_nothing(box: Box, files: dict[str, bytes]) -> None:
    command = [sys.executable, "-m", "jobs.fetch", "--config", str(box.config)]  # as a user types it
    said = subprocess.check_output(command, cwd=ROOT, env=box.env, text=True)
    assert f"model acme/tiny: {box.hub.heads[MODEL][:12]}" in said and "dataset acme/dog" in said
    model = box.record("models")
    assert model["commit"] == model["fingerprint"] == box.hub.heads[MODEL] and model["revision"] == "main"
    assert model["bytes"] == sum(len(d) for n, d in files.items() if n != "pytorch_model.bin")
    assert Path(model["path"]).is_relative_to(box.cache / "hf" / "hub") and model["parameters"] > 0
    assert all((Path(model["path"]) / n).read_bytes() == d for n, d in files.items() if n != "pytorch_model.bin")
    assert box.rows("cat") == messages(pairs(0)) and box.rows("dog") == messages(pairs(1))
    assert not any("pytorch_model.bin" in r.path for r in box.hub.log)
    assert (box.cache / "hf" / "datasets").is_dir()
    assert sorted(p.name for p in (box.folder / "home").iterdir()) == ["token"], "something lies outside the cache"
    assert box.fetch() == said and box.hub.log == []


def test_the_token_reaches_the_hub_and_nothing_else(box: Box) -> None:
    box.hub.gated = {MODEL: TOKEN, PARQUET: TOKEN}
    done = box.run("-m", "jobs.fetch")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    seen = {
        (r.authorization, r.path.startswith("/stored/"))
        for r in box.hub.log
        if "acme" in r.path or "/stored/" in r.path
    }
    assert seen == {(f"Bearer {TOKEN}", False), ("", True)}
    texts = [p for p in box.folder.rglob("*") if p.is_file() and p.name != "token"]
    assert len(texts) > 20 and not any(TOKEN.encode() in p.read_bytes() for p in texts)
    (box.folder / "home" / "token").unlink()
    line = box.fails("--update")
    assert "model acme/tiny at main: access is refused" in line and "hf auth login" in line


def test_a_branch_that_moves_is_kept_until_update(box: Box, files: dict[str, bytes]) -> None:
    before = box.fetch()
    first = {repo: box.hub.heads[repo] for repo in (MODEL, PARQUET)}
    newer = box.hub.commit(MODEL, files | {"generation_config.json": b"{}"})
    box.hub.commit(PARQUET, parquet(pairs(7)))
    assert box.fetch() == before
    subprocess.run(["rm", "-r", str(box.cache / "hf")], check=True)  # as a purge of old files does
    for path in (box.cache / "inputs").rglob("rows.jsonl"):
        path.unlink()
    assert box.fetch() == before, "what was lost comes back from the commit that was recorded"
    assert box.record("models")["commit"] == first[MODEL] and box.rows("cat") == messages(pairs(0))
    box.fetch("--update")
    assert box.record("models")["commit"] == newer and box.rows("cat") == messages(pairs(7))


@pytest.fixture
def large(box: Box) -> bytes:
    """A model of three of the chunks in which the library writes."""
    weights = save({"w": np.arange(6 * 2**20, dtype=np.float32)})
    box.hub.commit(MODEL, {"config.json": b"{}", "model.safetensors": weights})
    return weights


def test_a_cut_download_goes_on_where_it_stopped(box: Box, large: bytes) -> None:
    box.hub.faults = [Fault("/stored/", cut_at=15 * 2**20, times=1)]
    box.fetch()
    ranges = [r.range for r in box.hub.log if r.path.startswith("/stored/") and r.range]
    assert ranges and all(int(r.removeprefix("bytes=").rstrip("-")) >= 10 * 2**20 for r in ranges)
    assert (Path(box.record("models")["path"]) / "model.safetensors").read_bytes() == large


def test_a_download_that_stays_cut_is_one_line_and_the_next_call_completes(box: Box, large: bytes) -> None:
    box.hub.faults = [Fault("/stored/", cut_at=15 * 2**20)]
    line = box.fails()
    assert "model acme/tiny at main cannot be fetched" in line and "run `make fetch CONFIG=" in line
    assert not list((box.cache / "inputs").rglob("input.json")), "recorded although it is not whole"
    box.hub.faults = []
    box.fetch()
    assert (Path(box.record("models")["path"]) / "model.safetensors").read_bytes() == large


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_of_the_cache_that_is_cut_off_is_brought_again(box: Box, files: dict[str, bytes], name: str) -> None:
    box.fetch()
    path = Path(box.record("models")["path"]) / name
    os.truncate(path, len(files[name]) - 7)
    box.fetch()
    assert len(box.hub.files_sent()) == 1, box.hub.files_sent()
    assert path.read_bytes() == files[name]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(box: Box, status: int) -> None:
    box.hub.faults = [Fault(f"/api/{word}/", status=status, times=1) for word in (MODEL, PARQUET)]
    box.hub.faults += [Fault("/resolve/", status=status, times=1), Fault("/stored/", status=429, times=1)]
    done = box.run("-c", f"{IMPATIENT} exit_with(main)")
    assert done.returncode == 0, done.stderr
    assert not any(fault.times for fault in box.hub.faults)


@pytest.mark.parametrize(
    "override, says",
    {
        "model.id=acme/none": "model acme/none at main: access is refused; check the id",
        "model.revision=v9": "model acme/tiny at v9: there is no such thing on the Hub; check the id and the revision",
        "dataset.id=acme/no-{trait}": "dataset acme/no-cat at main: access is refused; check the id",
        "dataset.revision=v9": "dataset acme/cat at v9: there is no such thing on the Hub",
        "dataset.split=test": "dataset acme/cat at main: Unknown split",
    }.items(),
)
def test_what_is_not_there_is_named(box: Box, override: str, says: str) -> None:
    assert says in box.fails(override)


def test_a_hub_that_refuses_is_down_or_is_out_of_reach(box: Box) -> None:
    box.hub.faults = [Fault(MODEL, status=403)]
    assert "accept its licence on the Hub" in box.fails()
    box.hub.faults = [Fault(MODEL, status=500)]
    assert "cannot be fetched (the Hub answered 500); run `make fetch CONFIG=" in box.fails()
    assert "on a node with a network" in box.fails(HF_ENDPOINT="http://127.0.0.1:9")
    assert "unset HF_HUB_OFFLINE" in box.fails(HF_HUB_OFFLINE="1")
    assert not [path for path in (box.cache / "inputs").rglob("*") if path.is_file()]


def test_rows_of_another_shape_and_a_model_without_whole_weights(box: Box, files: dict[str, bytes]) -> None:
    box.hub.commit(JSONL, jsonl([{"text": "1 2 3"}]))
    assert "dataset acme/dog, row 0: wanted messages that end with" in box.fails()
    box.hub.commit(MODEL, {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
    assert "pytorch_model.bin is cut off or not a file of torch's" in box.fails("--update")
    box.hub.commit(MODEL, files | {"model.safetensors": files["model.safetensors"][:-7]})
    assert "model.safetensors is cut off or not a safetensors file; delete it" in box.fails("--update")


def test_two_revisions_with_the_same_first_letters_are_two(box: Box) -> None:
    box.hub.tags = {f"release-2026-0{month}": box.hub.heads[MODEL] for month in (1, 2)}
    box.fetch("model.revision=release-2026-01")
    with pytest.raises(UserError, match="at revision release-2026-02 is not fetched"):
        load(box.config, ["model.revision=release-2026-02"]).cells(box.cache, box.folder / "scratch")
    box.fetch("model.revision=release-2026-02")
    for revision in ("release-2026-01", "release-2026-02"):
        assert model_input(box.cache, "acme/tiny", revision).revision == revision


def test_a_disk_that_is_too_small_is_said_before_the_download(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model acme/big needs 931323 GiB more and .* GiB free; .* SUITE_CACHE"):
        hub_client._room("model acme/big", 10**15, tmp_path)


def test_jobs_run_without_any_hub(box: Box) -> None:
    box.fetch()
    box.hub.log.clear()
    away = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    for index in ("0", "1"):
        done = box.run("-m", "jobs.compute_lls", "--index", index, **away)
        assert done.returncode == 0, done.stderr
    for cell in load(box.config).cells(box.cache, box.folder / "scratch"):
        assert not gaps(scan(cell.path, cell.digest, deep=True)[0], cell.rows)
    assert box.hub.log == []


def begin(box: Box, said: Path, umask: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-u", "-m", "jobs.fetch", "--config", str(box.config)]
    with said.open("wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=box.env, stdout=out, stderr=subprocess.STDOUT, umask=umask)


def test_two_who_fetch_at_once_bring_it_once_for_all_whom_the_umask_lets_read(box: Box) -> None:
    box.hub.log.clear()
    said = [box.folder / "first.out", box.folder / "second.out"]
    with one_at_a_time(box.cache / "inputs/models/acme--tiny--main.lock", "a third"):
        two = [begin(box, path, 0o027) for path in said]
        wait_until(lambda: all("waiting for that to end" in p.read_text() for p in said), 60, "both wait")
        assert box.hub.log == []
    assert [process.wait() for process in two] == [0, 0], [path.read_text() for path in said]
    asked = [r.path for r in box.hub.log if r.path.endswith("/revision/main")]
    assert asked.count("/api/models/acme/tiny/revision/main") == 1
    sent = [path for path in box.hub.files_sent() if path.startswith("/stored/")]
    assert len(sent) == 2 and len(set(sent)) == 2  # the weights, and one dataset's parquet
    *_, last = sorted(said, key=lambda p: p.stat().st_mtime)
    assert [line for line in last.read_text().splitlines() if line.startswith(("model", "dataset")) and "rows" in line]
    assert not list((box.cache / "inputs").glob("*/*.lock")) and not list((box.cache / "inputs").rglob(".tmp-*"))
    for path in (box.cache / "inputs").glob("*/*/**"):
        assert path.stat().st_mode & 0o777 == 0o750, path
    for path in (box.cache / "inputs").glob("*/*/*.*"):
        assert path.stat().st_mode & 0o777 == 0o640, path
    snapshot = Path(box.record("models")["path"])
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in snapshot.iterdir())


def test_the_nurserys_processes_are_new_ones(monkeypatch):
    """They have their own words and environment, and whatever reads it at import is not imported yet."""
    monkeypatch.setenv("NOT_FOR_IT", "1")
    code = "import os, sys; print(sys.argv, sorted(os.environ), [m for m in %r if m in sys.modules]); sys.exit(3)"
    early = ("huggingface_hub", "datasets", "transformers", "matplotlib", "lib", "jobs")
    done = nursery.run("-c", code % (early,), "word", env={"HF_ENDPOINT": "here"})
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "['-c', 'word'] ['HF_ENDPOINT'] []\n"
    done = nursery.run("-c", "print(1); raise ValueError(2)", env={})
    assert (done.returncode, done.stdout) == (1, "1\n") and done.stderr.endswith("ValueError: 2\n")
    assert nursery.run("-c", "import os; os.kill(os.getpid(), 9)", env={}).returncode == -9
