"""Preflight of this machine: every check holds and fails for its own reason; the whole as a user calls it."""

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Slurm
from tools import number_rows, python, tiny_model, write_rows

from lib.base.errors import UserError
from lib.cluster import doctor, gpus, probe, request
from lib.cluster.plan import plan
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.records import dataset_folder, model_input, save_model
from lib.run.experiment import Estimate, Needs
from lib.run.site import Site

TOKEN = "hf_" + "S3cretS3cret" * 3


def stub(folder: Path, name: str, text: str) -> dict[str, str]:
    """An environment whose PATH starts with a command of that name that says the text."""
    path = folder / name
    path.write_text(f"#!/bin/bash\ncat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def failed(lines: dict[str, request.Line]) -> list[str]:
    return [name for name, line in lines.items() if line.level == "FAIL"]


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> tuple[Path, Site]:
    """A fetched experiment of two cells, and a site without Slurm."""
    folder = tmp_path_factory.mktemp("doctor")
    tiny_model(folder / "source")
    for i, trait in enumerate(("cat", "dog")):
        write_rows(folder / f"{trait}.jsonl", number_rows(6, i))
    (folder / "small.yaml").write_text(
        f"kind: lls\nname: small\nmodel: {{id: {folder}/source, dtype: float32}}\ntraits: [cat, dog]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: '{folder}/{{trait}}.jsonl'}}\nrun: {{gpus: 0}}\n"
    )
    fetch(load(folder / "small.yaml"), folder / "cache")
    env = os.environ | {"SUITE_SLURM": "no", "HF_TOKEN_PATH": str(folder / "token")}
    site = Site("local", folder / "scratch", folder / "cache", folder / "outputs", 2, "cpu", env)
    return folder / "small.yaml", site


def plans_of(box: tuple[Path, Site]) -> list:
    experiment, site = load(box[0]), box[1]
    return plan(experiment, experiment.cells(site.cache, site.scratch), site.cache, "cpu")


def test_a_folder_that_can_be_written_and_one_that_cannot(tmp_path: Path) -> None:
    assert doctor.writable("scratch", tmp_path / "new" / "deep", "SUITE_SCRATCH").level == "ok"
    assert list((tmp_path / "new" / "deep").iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "under", Path("/proc/nope")):
        line = doctor.writable("scratch", bad, "SUITE_SCRATCH")
        assert line.level == "FAIL" and "SUITE_SCRATCH=" in line.fix, bad


def test_space_and_inodes(box: tuple[Path, Site]) -> None:
    site, plans = box[1], plans_of(box)
    assert {line.name: line.level for line in doctor.space_lines(site, plans, 0)} == {"space": "ok", "inodes": "ok"}
    huge = [dataclasses.replace(plans[0], estimate=Estimate(0, 10**18))]
    many = [dataclasses.replace(plans[0], shards=[(0, 1)] * 10**6)] * 10**5
    assert next(iter(doctor.space_lines(site, huge, 0))).level == "FAIL"
    assert [line.level for line in doctor.space_lines(site, many, 0)] == ["ok", "FAIL"]
    assert next(iter(doctor.space_lines(site, plans, 10**18))).level == "FAIL"  # a model to bring again
    uncounted = dataclasses.replace(site, scratch=Path("/proc/self"))
    assert [line.found for line in doctor.space_lines(uncounted, None, 0)][1] == "this file system does not count them"


QUOTAS = {
    "quota": "Disk quotas for group lab (gid 7):\n Filesystem blocks quota limit grace files quota limit grace\n"
    " vast:/n/scratch 900000 0 1000000 {files} 0 500",
    "lfs": " Filesystem used quota limit grace files quota limit grace\n"
    " /n/scratch 900000k 0k 1000000k - {files} 0 500 -",
}


@pytest.mark.parametrize("form", QUOTAS)
def test_quota_of_the_lab(box: tuple[Path, Site], tmp_path: Path, form: str) -> None:
    plans, scratch = plans_of(box), Path("/n/netscratch/lab/Lab/me")

    def line(files: int, plans: list) -> request.Line:
        env = stub(tmp_path, "quota", QUOTAS[form].format(files=files)) | {"SUITE_SITE": "fasrc"}
        return next(iter(doctor.quota_lines(env, scratch, plans)))

    assert line(7, plans).level == "ok" and "922 MB of 1.02 GB, 7 of 500 files" in line(7, plans).found
    assert line(495, plans).level == "FAIL"
    assert line(7, [dataclasses.replace(plans[0], estimate=Estimate(0, 60_000_000))]).level == "FAIL"


def test_quota_is_asked_only_where_it_can_be(tmp_path: Path) -> None:
    odd = stub(tmp_path, "quota", "no table here")
    scratch = Path("/n/netscratch/lab/Lab/me")
    assert [line.level for line in doctor.quota_lines(odd | {"SUITE_SITE": "fasrc"}, scratch, None)] == ["warn"]
    assert list(doctor.quota_lines(odd, scratch, None)) == []
    assert list(doctor.quota_lines({"SUITE_SITE": "fasrc", "PATH": "/nonexistent"}, scratch, None)) == []


def test_python_and_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "lock-cpu.txt").write_text("a==1\n")
    done = subprocess.run(["sha256sum", tmp_path / "env" / "lock-cpu.txt"], capture_output=True, text=True, check=True)
    (tmp_path / ".venv" / "suite-stamp").write_text(f"cpu {done.stdout.split()[0]}\n")
    assert doctor.python_line(tmp_path).level == "ok"
    assert "neither 3.11 nor 3.12" in doctor.python_line(tmp_path, (3, 10)).found
    (tmp_path / "env" / "lock-cpu.txt").write_text("a==2\n")
    line = doctor.python_line(tmp_path)
    assert line.level == "FAIL" and line.fix == "make setup"
    assert doctor.python_line(tmp_path / "none").level == "FAIL"


SMI = "nvidia-smi"


@pytest.mark.parametrize(
    "cuda, gpu, wanted, bad",
    [
        ("13.0", "580.65, 9.0, NVIDIA H200", "h200", {}),
        ("13.0", "575.57, 9.0, NVIDIA H200", "h200", {"driver": "575.57"}),
        ("12.8", "570.12, 10.0, NVIDIA B200", "b200", {}),
        ("12.8", "550.10, 9.0, NVIDIA H200", "h200", {}),
        ("12.8", "565.10, 10.0, NVIDIA B200", "b200", {"driver": "570 or newer"}),
        ("12.8", "520.10, 9.0, NVIDIA H200", "h200", {"driver": "525 or newer"}),
        ("12.6", "565.10, 9.0, NVIDIA H200", "h200", {}),
        ("12.6", "580.65, 10.0, NVIDIA B200", "b200", {"torch": "no code for NVIDIA B200 (sm_100)"}),
        ("12.6", "580.65, 12.0, RTX PRO 6000", "b200", {"torch": "sm_120"}),
        ("12.6", "560.00, 7.0, V100", "a100", {}),
        ("13.0", "580.65, 7.0, V100", "a100", {"torch": "no longer serves V100"}),
        ("", "580.65, 9.0, NVIDIA H200", "h200", {"torch": "the CPU build"}),
        (None, "580.65, 9.0, NVIDIA H200", "h200", {"torch": "not in .venv"}),
    ],
)
def test_driver_and_architecture(tmp_path: Path, cuda: str | None, gpu: str, wanted: str, bad: dict[str, str]) -> None:
    lines = {line.name: line for line in gpus.gpu_lines(stub(tmp_path, SMI, gpu), cuda, wanted, slurm=True)}
    assert failed(lines) == list(bad)
    assert all(text in lines[name].found and lines[name].fix for name, text in bad.items())


def test_a_node_without_a_gpu(tmp_path: Path) -> None:
    none = {"PATH": str(tmp_path)}

    def levels(cuda: str, wanted: str, slurm: bool) -> dict[str, str]:
        return {line.name: line.level for line in gpus.gpu_lines(none, cuda, wanted, slurm)}

    assert levels("13.0", "h200", True) == {"torch": "ok", "driver": "warn"}  # nobody knows what the nodes have
    assert levels("13.0", "h200", False) == {"torch": "ok", "driver": "warn"}
    assert levels("12.6", "b200", True)["torch"] == "FAIL"
    assert levels("", "h200", True)["torch"] == "FAIL"
    assert levels("", "cpu", False) == {"torch": "ok"}


@pytest.mark.parametrize(
    "cuda, seen, level, fix",
    [
        ("13.0", "580.65.06", "ok", ""),
        ("13.0", "570.12", "FAIL", "make setup SUITE_BUILD=gpu takes the builds for CUDA 12.8"),
        ("13.0", "515.1", "FAIL", "a newer driver"),
        ("12.8", "570", "ok", ""),
        ("13.0", "", "warn", "make doctor GPU=1"),
    ],
)
def test_the_driver_of_the_nodes_that_a_login_node_does_not_have(tmp_path, monkeypatch, cuda, seen, level, fix) -> None:
    monkeypatch.setattr(gpus, "SEEN", tmp_path / ".driver")
    (tmp_path / ".driver").write_text(f"{seen}\n")
    none = {"PATH": str(tmp_path)}
    line = {line.name: line for line in gpus.gpu_lines(none, cuda, "h200", True, gpus.seen_driver(none))}["driver"]
    assert line.level == level and fix in line.fix and (seen or "needs 580") in line.found
    assert gpus.seen_driver(none | {"SUITE_DRIVER": "571"}) == "571"
    with pytest.raises(UserError, match="no driver's version"):
        gpus.seen_driver(none | {"SUITE_DRIVER": "new"})


def test_torchs_cuda_is_read_from_its_text() -> None:
    import torch

    assert gpus.torch_cuda() == (torch.version.cuda or "")


def test_inputs_that_are_whole_cut_off_edited_or_absent(box: tuple[Path, Site]) -> None:
    config, site = box
    experiment = load(config, ["model.id=acme/tiny"])  # as one of the Hub: no source whose change would tell
    local = model_input(site.cache, load(config).model.id, "main")
    save_model(site.cache, dataclasses.replace(local, id="acme/tiny", source_stamp=""))
    assert doctor.models_line(experiment, site.cache).level == "ok"
    assert doctor.datasets_line(experiment, site.cache).found.startswith("2, 12 rows")
    assert doctor.lost_bytes(experiment, site.cache) == 0
    for name, says in {"model.safetensors": "is cut off", "tokenizer.json": "holds [0-9]+ of [0-9]+ bytes"}.items():
        path = Path(local.path) / name
        whole, stat = path.read_bytes(), path.stat()
        try:
            path.write_bytes(whole[:-1])
            with pytest.raises(UserError, match=f"{says}.*; run `make fetch` again"):
                doctor.models_line(experiment, site.cache)
            assert doctor.lost_bytes(experiment, site.cache) == local.bytes
        finally:
            path.write_bytes(whole)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert doctor.models_line(experiment, site.cache).level == "ok"
    rows = dataset_folder(site.cache, experiment.datasets()[1].id, "main", "train") / "rows.jsonl"
    whole = rows.read_bytes()
    for edited in (whole.replace(b"1", b"2"), None):
        try:
            rows.unlink() if edited is None else rows.write_bytes(edited)
            with pytest.raises(UserError, match=r"rows\.jsonl .*; run `make fetch`"):
                doctor.datasets_line(experiment, site.cache)
        finally:
            rows.write_bytes(whole)
    with pytest.raises(UserError, match="is not fetched; run `make fetch`"):
        doctor.models_line(experiment, site.cache / "elsewhere")


def test_the_tokens_file(box: tuple[Path, Site], tmp_path: Path) -> None:
    local, hub = load(box[0]), load(ROOT / "configs" / "lls_72b.yaml")
    site = dataclasses.replace(box[1], env={"HF_TOKEN_PATH": str(tmp_path / "token")})
    assert doctor.token_line(local, site).level == "ok"
    assert doctor.token_line(hub, site).level == "warn" and "hf auth login" in doctor.token_line(hub, site).fix
    for name in ("token", "stored_tokens"):
        path = tmp_path / name
        path.write_text(TOKEN)
        for mode, level in ((0o600, "ok"), (0o640, "FAIL"), (0o604, "FAIL"), (0o400, "ok")):
            path.chmod(mode)
            line = doctor.token_line(local, site)
            assert line.level == level and TOKEN not in line.found + line.fix
            assert level == "ok" or line.fix == f"chmod 600 {path}"


@pytest.mark.parametrize("name", doctor.SECRETS)
def test_tokens_in_the_environment(name: str) -> None:
    line = doctor.secrets_line({name: TOKEN})
    assert line.level == "warn" and name in line.found and line.fix.startswith(f"unset {name}")
    assert doctor.secrets_line({}).level == "ok"


def call(box: tuple[Path, Site], **env: str) -> subprocess.CompletedProcess[str]:
    config, site = box
    roots = {"SUITE_SCRATCH": site.scratch, "SUITE_CACHE": site.cache, "SUITE_OUTPUT": site.output}
    program = (
        "import sys; sys.argv[0] = 'doctor'; from jobs.cluster import main; code = main();"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    settings = {k: str(v) for k, v in roots.items()} | {"SUITE_SITE": "local", "SUITE_SLURM": "no", "SUITE_GPU": "cpu"}
    token = {"HF_TOKEN_PATH": site.env["HF_TOKEN_PATH"]}
    return python("-c", program, "doctor", "--config", str(config), env=settings | token | env)


def test_one_line_a_check_and_the_exit_code(box: tuple[Path, Site]) -> None:
    Path(box[1].env["HF_TOKEN_PATH"]).write_text(TOKEN)
    Path(box[1].env["HF_TOKEN_PATH"]).chmod(0o600)
    good = call(box, HF_TOKEN=TOKEN)
    assert good.returncode == 0, good.stdout + good.stderr
    names = "slurm workers site scratch output space inodes python torch models datasets token secrets"
    assert [line.split()[1] for line in good.stdout.splitlines()[:-1]] == names.split()
    assert good.stdout.splitlines()[-1] == "12 ok, 1 warn, 0 FAIL"
    Path(box[1].env["HF_TOKEN_PATH"]).chmod(0o644)
    bad = call(box, HF_TOKEN=TOKEN, SUITE_SCRATCH=f"{box[0]}/under", SUITE_GPU="h200")
    assert bad.returncode == 1
    fails = [line for line in bad.stdout.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in fails] == ["scratch", "torch", "token"] and all(
        "; fix: " in line for line in fails
    )
    assert TOKEN not in good.stdout + good.stderr + bad.stdout + bad.stderr


def test_inputs_that_are_missing_fail_and_the_rest_is_checked(box: tuple[Path, Site], tmp_path: Path) -> None:
    Path(box[1].env["HF_TOKEN_PATH"]).unlink(missing_ok=True)
    done = call(box, SUITE_CACHE=str(tmp_path))
    assert done.returncode == 1 and "known after `make fetch CONFIG=" in done.stdout
    fails = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert fails == ["models", "datasets"]


def test_modules_are_tried_as_a_job_loads_them() -> None:
    module = "() { [ $2 != gone ]; }"
    env = os.environ | {"BASH_FUNC_module%%": module, "SUITE_MODULES": "python/3 gone"}
    (line,) = doctor.module_lines(env, ROOT)
    assert (
        line.level == "warn" and line.found.startswith("module gone cannot be loaded") and "SUITE_MODULES" in line.fix
    )
    (line,) = doctor.module_lines(env | {"SUITE_MODULES": "python/3"}, ROOT)
    assert line.level == "ok"
    line, _ = doctor.module_lines({k: v for k, v in env.items() if not k.startswith("BASH_FUNC")}, ROOT)
    assert line.level == "warn" and "no module command" in line.found
    assert list(doctor.module_lines(dict(os.environ), ROOT)) == []


def test_gpus_are_asked_for_as_the_largest_task_needs_them(box, monkeypatch) -> None:
    """Of sizes of one experiment each needs its own number."""
    experiment, site = load(box[0]), box[1]
    asked = list[int]()
    monkeypatch.setattr(doctor, "workers_for", lambda gpus, most: asked.append(gpus) or 1)
    monkeypatch.setattr(type(experiment), "needs", lambda self, cache, cell: Needs(1 + cell.index))
    doctor.check(experiment, site)
    doctor.check(load(box[0], ["model.id=acme/none", "run.gpus=4"]), site)  # not fetched: as configured
    assert asked == [2, 4]


def test_what_the_site_took_is_said(box: tuple[Path, Site]) -> None:
    assert doctor.site_line(box[1]).level == "ok"
    note = "/n/netscratch/kempner_lab/Lab is taken, as there is no /n/netscratch/lab/Lab; export FASRC_LAB=<folder>"
    line = doctor.site_line(dataclasses.replace(box[1], env={"SUITE_SITE_NOTE": note}))
    assert line.level == "warn" and line.found.endswith("no /n/netscratch/lab/Lab") and "FASRC_LAB" in line.fix


def test_a_probe_without_slurm_asks_this_node(box, tmp_path, monkeypatch, capsys) -> None:
    """Its nvidia-smi lists a GPU that is not there: what torch and scratch say is real."""
    monkeypatch.setattr(probe, "SEEN", tmp_path / ".driver")
    path = stub(tmp_path, SMI, "570.86.15, 9.0, NVIDIA H200")
    site = dataclasses.replace(box[1], env=box[1].env | path | {"SUITE_SITE": "local", "SUITE_SCRATCH": str(tmp_path)})
    assert probe.show(dataclasses.replace(site, scratch=tmp_path)) == 1
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [(level, name) for level, name, _ in lines] == [
        ("ok", "gpu"), ("ok", "torch"), ("FAIL", "cuda"), ("ok", "read"),
    ]  # fmt: skip
    assert "does not compute" in lines[2][2] and "64 MiB" in lines[3][2]
    assert (tmp_path / ".driver").read_text() == "570.86.15\n" and not list(tmp_path.glob(".probe-*"))


def test_make_doctor_on_the_real_slurm(slurm: Slurm, box: tuple[Path, Site]) -> None:
    """With GPU=1 a job looks at a node; the GPUs of this Slurm are pretended, which is one line."""
    config, site = box
    roots = {"SUITE_SCRATCH": site.scratch, "SUITE_CACHE": site.cache, "SUITE_OUTPUT": site.output}
    Path(site.env["HF_TOKEN_PATH"]).unlink(missing_ok=True)
    env = {"SUITE_GPU": "cpu", "HF_TOKEN_PATH": site.env["HF_TOKEN_PATH"], **{k: str(v) for k, v in roots.items()}}
    command = ["make", "-s", "doctor", f"CONFIG={config}", "SET=run.shard_rows=2", "GPU=1"]
    done = subprocess.run(command, cwd=ROOT, env=slurm.env | env, capture_output=True, text=True, check=False)
    said = done.stdout
    job = re.search(r"asking a node by Slurm job (\d+)", done.stderr)
    assert done.returncode and job, said + done.stderr
    for path in (ROOT / "slurm" / "logs").glob(f"probe-{job[1]}_*.out"):  # others' tests write there too
        path.unlink()
    assert [line for line in said.splitlines() if line.startswith("FAIL")] == [said.splitlines()[0]]
    assert re.match(r"FAIL  gpu        no GPU on node n\d: nvidia-smi lists none; fix: ", said)
    assert "64 MiB of" in said.splitlines()[1]
    assert "ok    sbatch     takes the request" in said and "2 cells, MaxArraySize is 10001" in said
    assert "20 files needed" in said  # 2 cells of 3 shards: two files a shard and four a cell
    assert not list(site.scratch.glob(".probe-*"))


def test_a_probe_that_slurm_refuses_or_that_leaves_no_answer(slurm: Slurm, box: tuple[Path, Site], tmp_path) -> None:
    site = dataclasses.replace(box[1], env=slurm.env | {"SBATCH_PARTITION": "nope"}, scratch=tmp_path)
    (line,) = probe._asked(site, tmp_path)
    assert line.level == "FAIL" and line.found.startswith("refused: sbatch: error: ")
    site = dataclasses.replace(site, env=slurm.env | {"SUITE_MAX_REQUEUES": "x"})
    (line,) = probe._asked(site, tmp_path)
    assert "is FAILED and left no answer: error: SUITE_MAX_REQUEUES=x is no number" in line.found
    Path(line.fix.removeprefix("see ")).unlink()
