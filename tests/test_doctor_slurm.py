"""Preflight of a submission: what the batch script asks is read as sbatch reads it, and held against the real Slurm."""

import getpass
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Slurm

from lib.base.errors import UserError
from lib.cluster import request

SCRIPT = ROOT / "slurm" / "compute_lls.sbatch"


def asked(env: dict[str, str], cells: int | None = 3) -> dict[str, request.Line]:
    return {line.name: line for line in request.slurm_lines(env, ROOT, SCRIPT, cells)}


def failed(lines: dict[str, request.Line]) -> list[str]:
    return [name for name, line in lines.items() if line.level == "FAIL"]


def test_the_request_is_read_as_sbatch_reads_it(fresh_slurm: Slurm, tmp_path: Path) -> None:
    text = (
        "#!/bin/bash\n#SBATCH --partition=nowhere\n# a comment\n\n#SBATCH -t 90 --comment=x # and --time=5\n"
        "##SBATCH --time=7\n #SBATCH --time=8\n#SBATCH --gpus-per-node=2 -C local\n#SBATCH --partition=high\n"
        "echo\n#SBATCH --time=9\n"
    )
    (tmp_path / "job.sbatch").write_text(text.replace(" #SBATCH --time=8\n", ""))
    job = fresh_slurm.sbatch(
        "-H", "-o", "/dev/null", "job.sbatch", cwd=tmp_path, SBATCH_PARTITION="main", SBATCH_MEM_PER_GPU="100M"
    )
    shown = fresh_slurm.show(job)
    env = {"SBATCH_PARTITION": "main", "SBATCH_MEM_PER_GPU": "100M"}
    found = request.requested((tmp_path / "job.sbatch").read_text(), env)
    assert shown["Partition"] == found["partition"] == "main"
    assert shown["TimeLimit"] == "01:30:00" and request.minutes(found["time"]) == 90
    assert shown["Features"] == found["constraint"] == "local"
    assert shown["TresPerNode"].endswith(f"gpu:{request.gpus_of(found)}") and request.gpus_of(found) == 2
    assert request.requested("#SBATCH --time=1\necho\n", {"SBATCH_TIMELIMIT": "2"}) == {"time": "2"}


@pytest.mark.parametrize(
    "text, minutes",
    {
        "4": 4,
        "4:30": 4.5,
        "2:00:00": 120,
        "1-0": 1440,
        "0-04:00": 240,
        "1-1:30:30": 1530.5,
        "UNLIMITED": float("inf"),
    }.items(),
)
def test_slurms_times(text: str, minutes: float) -> None:
    assert request.minutes(text) == minutes


def test_a_time_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match="time 'soon' is not one of"):
        request.minutes("soon")


@pytest.mark.parametrize(
    "options, gpus",
    [
        ({"gpus-per-node": "h200:4"}, 4),
        ({"gpus": "2"}, 2),
        ({"gres": "gpu:a100:3"}, 3),
        ({"gres": "gpu:1"}, 1),
        ({}, 0),
    ],
)
def test_gpus_asked(options: dict[str, str], gpus: int) -> None:
    assert request.gpus_of(options) == gpus


def test_features() -> None:
    node = "h200,ib,amd"
    assert all(request.has_features(node, c) for c in ("", "h200", "a100|h200", "h200&ib", "[h200|a100]", "(h200&ib)"))
    assert not any(request.has_features(node, c) for c in ("h100", "h200&rtx", "a100|h100", "h2"))


@pytest.fixture
def env(slurm: Slurm) -> dict[str, str]:
    return dict(slurm.env)


def test_what_fits_passes_every_check(env: dict[str, str]) -> None:
    lines = asked(env)
    assert list(lines) == ["slurm", "account", "partition", "time", "nodes", "array", "sbatch"]
    assert {line.level for line in lines.values()} == {"ok"}, lines
    assert "3 nodes of main have that" in lines["nodes"].found


@pytest.mark.parametrize(
    "variable, value, name, found, fix",
    [
        ("SBATCH_PARTITION", "nope", "partition", "nope not found", "SBATCH_PARTITION="),
        ("SBATCH_CONSTRAINT", "h200", "nodes", "no node of main is h200 (local)", "SBATCH_CONSTRAINT="),
        ("SBATCH_GPUS_PER_NODE", "3", "nodes", "at most 2 GPU", "SBATCH_GPUS_PER_NODE"),
        ("SBATCH_MEM_PER_GPU", "900G", "nodes", "no node has that much", "SBATCH_MEM_PER_GPU"),
        ("SBATCH_CPUS_PER_GPU", "99", "nodes", "no node has that much", "SBATCH_CPUS_PER_GPU"),
        ("SBATCH_RESERVATION", "none_such", "sbatch", "eservation", "DRY=1"),
        ("PATH", "/nonexistent", "slurm", "sbatch is not on PATH", "SUITE_SLURM=no"),
    ],
)
def test_a_request_that_does_not_fit(env, variable, value, name, found, fix) -> None:
    lines = asked(env | {variable: value})
    assert failed(lines) == [name]
    assert found in lines[name].found and fix in lines[name].fix


def test_a_controller_that_does_not_answer(slurm: Slurm, tmp_path: Path) -> None:
    text = (slurm.folder / "etc" / "slurm.conf").read_text()
    text = re.sub(r"(?m)^SlurmctldPort=.*", "SlurmctldPort=9\nMessageTimeout=2", text)
    (tmp_path / "slurm.conf").write_text(text)
    lines = asked(slurm.env | {"SLURM_CONF": str(tmp_path / "slurm.conf")})
    assert list(lines) == failed(lines) == ["slurm"]
    assert "Unable to contact slurm controller" in lines["slurm"].found and "make slurm-up" in lines["slurm"].fix


def test_more_cells_than_an_array_can_have(env: dict[str, str]) -> None:
    assert asked(env, 10001)["array"].level == "ok"
    assert failed(asked(env, 10002)) == ["array"]


def test_no_slurm_is_said(env: dict[str, str]) -> None:
    lines = asked(env | {"SUITE_SLURM": "no"})
    assert list(lines) == ["slurm"] and "local workers" in lines["slurm"].found


def test_partition_state_limit_and_drained_nodes(fresh_slurm: Slurm) -> None:
    env = fresh_slurm.env
    update = ["scontrol", "update"]
    try:
        fresh_slurm.run(*update, "partitionname=main", "state=down")
        lines = asked(env)
        assert failed(lines) == ["partition"] and "main is DOWN" in lines["partition"].found
        fresh_slurm.run(*update, "partitionname=main", "state=up", "maxtime=30")
        lines = asked(env)
        assert failed(lines) == ["time"] and lines["time"].fix == "export SBATCH_TIMELIMIT=00:30:00"
        assert asked(env | {"SBATCH_TIMELIMIT": "00:30:00"})["time"].level == "ok"
        fresh_slurm.run(*update, "partitionname=main", "maxtime=infinite")
        fresh_slurm.run(*update, "nodename=n[1-3]", "state=drain", "reason=test")
        lines = asked(env)
        assert not failed(lines) and lines["nodes"].level == "warn" and "drained" in lines["nodes"].found
    finally:
        fresh_slurm.run(*update, "partitionname=main", "state=up", "maxtime=infinite")
        subprocess.run([*update, "nodename=n[1-3]", "state=resume"], env=env, check=False, capture_output=True)


def test_kempners_partitions_demand_an_account_of_yours(fresh_slurm: Slurm) -> None:
    env = fresh_slurm.env | {"SBATCH_PARTITION": "kempner_requeue"}
    me = getpass.getuser()
    fresh_slurm.run("scontrol", "create", "partitionname=kempner_requeue", "nodes=ALL")
    fresh_slurm.run("sacctmgr", "-i", "add", "account", "kempner_lab")
    fresh_slurm.run("sacctmgr", "-i", "add", "user", me, "account=kempner_lab")
    try:
        lines = asked(env)
        assert failed(lines) == ["account"] and lines["account"].fix == "export SBATCH_ACCOUNT=kempner_lab"
        assert asked(env | {"SBATCH_ACCOUNT": "kempner_lab"})["account"].level == "ok"
        lines = asked(env | {"SBATCH_ACCOUNT": "kempner_other"})
        assert failed(lines) == ["account"] and "not among your accounts" in lines["account"].found
    finally:
        fresh_slurm.run("sacctmgr", "-i", "delete", "user", me, "account=kempner_lab")
        fresh_slurm.run("sacctmgr", "-i", "delete", "account", "kempner_lab")
        fresh_slurm.run("scontrol", "delete", "partitionname=kempner_requeue")
