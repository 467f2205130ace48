"""env/slurm-up.sh raises a Slurm that behaves, and env/slurm-down.sh leaves nothing of it."""

import os
import socket
import subprocess
import tempfile
from pathlib import Path

from conftest import ROOT, TMP, Slurm, lower_slurm, raise_slurm, wait_until

SCRIPT = """#!/bin/bash
#SBATCH --partition=gpu_requeue
#SBATCH --constraint=h200
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=180G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%A_%a.out
echo "$SLURMD_NODENAME gpu $CUDA_VISIBLE_DEVICES restart ${SLURM_RESTART_COUNT:-0}"
exec sleep "$1"
"""


def script(folder: Path) -> Path:
    path = folder / "job.sbatch"
    path.write_text(SCRIPT)
    return path


def processes_of(folder: Path) -> list[str]:
    """Living processes that name the folder on their command line, in their environment or among their open files."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            text = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
            files = [str(fd.readlink()) for fd in (proc / "fd").iterdir()]
        except OSError:
            continue
        if int(proc.name) != os.getpid() and (
            str(folder).encode() in text or any(f.startswith(f"{folder}/") for f in files)
        ):
            found.append((proc / "comm").read_text().strip())
    return found


def test_gpus_are_numbered_within_a_node(fresh_slurm: Slurm, tmp_path: Path) -> None:
    job = fresh_slurm.sbatch("--array=0-2", "--nodelist=n2", script(tmp_path), "600", cwd=tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("*.out"))) == 2, 20, "two tasks did not start")
    wait_until(lambda: fresh_slurm.show(f"{job}_2")["Reason"] == "Resources", 10, "the third does not wait for a GPU")
    said = [(tmp_path / f"{job}_{i}.out").read_text() for i in range(2)]
    assert sorted(said) == ["n2 gpu 0 restart 0\n", "n2 gpu 1 restart 0\n"]
    fresh_slurm.run("scancel", f"{job}_0")
    freed = tmp_path / f"{job}_2.out"
    wait_until(lambda: freed.exists() and freed.read_text() == said[0], 30, "the third has not the freed GPU")


def test_array_throttle_and_accounting(fresh_slurm: Slurm, tmp_path: Path) -> None:
    job = fresh_slurm.sbatch("--array=0-4%2", script(tmp_path), "1", cwd=tmp_path)
    at_once = []

    def ended() -> bool:
        states = list(fresh_slurm.states(job).values())
        at_once.append(states.count("RUNNING"))
        return states.count("COMPLETED") == 5

    wait_until(ended, 40, "the array did not end")
    assert max(at_once) == 2
    rows = fresh_slurm.sacct(job, rows=5)
    assert {r["JobID"] for r in rows} == {f"{job}_{i}" for i in range(5)}
    assert {r["State"] for r in rows} == {"COMPLETED"}
    assert all("gres/gpu=1" in r["AllocTRES"] and int(r["ElapsedRaw"]) >= 1 for r in rows)


def test_high_evicts_main_which_comes_back(fresh_slurm: Slurm, tmp_path: Path) -> None:
    low = fresh_slurm.sbatch("--gpus-per-node=2", "--nodelist=n1", script(tmp_path), "600", cwd=tmp_path)
    fresh_slurm.wait_for(low, "RUNNING")
    high = fresh_slurm.sbatch("-p", "high", "--nodelist=n1", script(tmp_path), "1", cwd=tmp_path)
    fresh_slurm.wait_for(high, "COMPLETED")

    def said() -> list[str]:
        lines = next(tmp_path.glob(f"{low}_*.out")).read_text().splitlines()
        return [line for line in lines if not line.startswith("slurmstepd")]

    wait_until(lambda: said() == ["n1 gpu 0,1 restart 0", "n1 gpu 0,1 restart 1"], 60, lambda: str(said()))
    fresh_slurm.run("scancel", low)
    assert [r["State"].split()[0] for r in fresh_slurm.sacct(low, rows=2)] == ["PREEMPTED", "CANCELLED"]


def test_a_dead_node_gives_its_job_away_and_comes_back(fresh_slurm: Slurm, tmp_path: Path) -> None:
    job = fresh_slurm.sbatch(script(tmp_path), "600", cwd=tmp_path)
    fresh_slurm.wait_for(job, "RUNNING")
    node = fresh_slurm.show(job)["NodeList"]
    fresh_slurm.kill_node(node)
    wait_until(lambda: fresh_slurm.show(job)["Restarts"] == "1", 20, "not requeued")
    fresh_slurm.wait_for(job, "RUNNING", timeout=40)
    assert fresh_slurm.show(job)["NodeList"] != node
    fresh_slurm.revive_node(node)


def test_state_survives_down_and_up(tmp_path: Path) -> None:
    box = raise_slurm("--no-accounting", "--gpus", 1, "--cpus", 2, "--memory", 2000)
    try:
        running = box.sbatch(script(tmp_path), "600", cwd=tmp_path)
        waiting = box.sbatch(script(tmp_path), "600", cwd=tmp_path)
        box.wait_for(running, "RUNNING")
        again = subprocess.run(
            [ROOT / "env/slurm-up.sh", "--dir", box.folder], text=True, capture_output=True, check=False
        )
        assert again.returncode == 0 and "runs already" in again.stdout
        subprocess.run([ROOT / "env/slurm-down.sh", "--dir", box.folder], check=True)
        assert not list(tmp_path.glob(f"{waiting}_*.out")), "the waiting job was let into the freed place"
        assert processes_of(box.folder) == []
        raise_slurm("--no-accounting", "--gpus", 1, "--cpus", 2, "--memory", 2000, folder=box.folder)
        box.wait_for(waiting, "RUNNING")
        box.wait_for(running, "PENDING")  # requeued: it may start two minutes later
    finally:
        lower_slurm(box.folder)
    assert processes_of(box.folder) == []


def test_a_failed_start_leaves_no_daemon(tmp_path: Path) -> None:
    broken = tmp_path / "slurmd"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="suite-", dir=TMP) as name:
        done = subprocess.run(
            [ROOT / "env/slurm-up.sh", "--dir", name, "--no-accounting", "--test", "--port", "19200"],
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 1 and "slurmd n1 did not start" in done.stderr
        assert processes_of(Path(name)) == []


def test_a_busy_port_is_named() -> None:
    with socket.create_server(("", 0)) as server, tempfile.TemporaryDirectory(prefix="suite-", dir=TMP) as name:
        port = server.getsockname()[1]
        done = subprocess.run(
            [ROOT / "env/slurm-up.sh", "--dir", name, "--test", "--port", str(port)],
            text=True,
            capture_output=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == f"slurm-up: port {port} is in use; choose another --port\n"
