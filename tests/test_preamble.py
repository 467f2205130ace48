"""The batch scripts' common part: signals at any moment, whose end is the job's end, who may write what is executed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, Slurm, wait_until

SLOW = "() { touch $HERE/up; until [ -e $HERE/go ]; do sleep 0.1; done; }"  # `module load` of a site, at its worst
NAP = "import pathlib, time\npathlib.Path('napping').touch()\ntime.sleep(60)\n"
LONG = f"""import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy_job
from lib.base.errors import exit_with
sys.argv = ["long", os.environ["HERE"]]
exit_with(numpy_job.main)
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with jobs of its own and a batch script that runs one of them after the suite's preamble."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/nap.py").write_text(NAP)
    (tmp_path / "jobs/long.py").write_text(LONG)
    script = f"#!/bin/bash\nSLURM_SUBMIT_DIR={ROOT}\n. {ROOT}/slurm/preamble.sh\ncd {tmp_path}\nrun_job $1\n"
    (tmp_path / "job.sbatch").write_text(script)
    return tmp_path


def environment(here: Path, **more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TRITON"))}
    return env | {"SUITE_SITE": "local", "SUITE_GPU": "cpu", "HERE": str(here), "SUITE_CACHE": str(here / "c")} | more


def batch(here: Path, job: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(here / "job.sbatch"), job],
        env=environment(here, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def beats(here: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in (here / "run" / "tasks").glob("[!.]*.json")]


def test_a_warning_that_comes_before_the_job_can_hear_it_is_work_left(here):
    """USR1 ends a Python that has no handler yet, with 138: for the batch script that is a job to run again."""
    job = batch(here, "nap")
    wait_until((here / "napping").exists, 60, "the job did not start")
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 75, job.stdout.read()


@pytest.mark.parametrize("signum, code", [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
def test_a_signal_during_the_preamble_is_heeded_and_no_job_is_started(here, signum, code):
    job = batch(here, "nap", **{"BASH_FUNC_module%%": SLOW, "SUITE_MODULES": "slow"})
    wait_until((here / "up").exists, 60, "the preamble did not start")
    job.send_signal(signum)
    (here / "go").touch()
    out, _ = job.communicate(timeout=60)
    assert job.returncode == code and not (here / "napping").exists(), out


def test_a_warning_during_a_slow_module_requeues_the_task_on_slurm(fresh_slurm: Slurm, here):
    env = {"BASH_FUNC_module%%": SLOW, "SUITE_MODULES": "slow", "HERE": str(here), "SUITE_CACHE": str(here / "c")}
    flags = (
        "--gpus-per-node=1",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@60",
        "--array=0",
        "--output",
        here / "out",
    )
    job = fresh_slurm.sbatch(*flags, here / "job.sbatch", "long", cwd=here, SHARD_SECONDS="0", **env)
    wait_until((here / "up").exists, 60, "the preamble did not start")
    fresh_slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_0")
    time.sleep(1)
    assert fresh_slurm.states(job) == {f"{job}_0": "RUNNING"}, (here / "out").read_text()
    (here / "go").touch()
    fresh_slurm.wait_for(job, "COMPLETED", timeout=60)
    out = (here / "out").read_text()
    assert fresh_slurm.show(f"{job}_0")["Restarts"] == "1" and "SIGUSR1 came before the job" in out, out
    assert out.count("job long") + out.count(": long") == 1 and [b["state"] for b in beats(here)] == ["done"], out


@pytest.mark.parametrize("killed", ["the batch script", "its daemon"])
def test_a_job_whose_starter_was_killed_ends_as_by_term(fresh_slurm: Slurm, here, killed):
    flags = ("--gpus-per-node=1", "--no-requeue", "--output", here / "out")
    env = {"HERE": str(here), "SUITE_CACHE": str(here / "c"), "SHARD_SECONDS": "0.5"}
    job = fresh_slurm.sbatch(*flags, here / "job.sbatch", "long", cwd=here, **env)
    wait_until(lambda: any(b["state"] == "running" for b in beats(here)), 60, "the job did not start")
    pid = beats(here)[0]["pid"]
    shell = parent(pid)
    os.kill(shell if killed == "the batch script" else parent(shell), signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 15, "the job goes on")
    assert [b["state"] for b in beats(here)] == ["terminated"] and beats(here)[0]["error"] == "SIGTERM"
    if killed != "the batch script":
        os.kill(shell, signal.SIGKILL)
    fresh_slurm.wait_for(job, timeout=60)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("watched", [True, False])
def test_only_a_batch_script_takes_its_job_with_it(here, watched):
    """A job typed by hand outlives its shell, as nohup and the like want it; one of the preamble's does not."""
    if watched:
        shell = batch(here, "long", SHARD_SECONDS="0.2")
    else:
        code = f"cd {here} && {ROOT}/.venv/bin/python -m jobs.long & wait"
        shell = subprocess.Popen(["bash", "-c", code], env=environment(here, SHARD_SECONDS="0.2"), text=True)
    wait_until(lambda: any(b["state"] == "running" for b in beats(here)), 60, "the job did not start")
    pid = beats(here)[0]["pid"]
    shell.kill()
    shell.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60, "the job goes on")
    assert [b["state"] for b in beats(here)] == ["terminated" if watched else "done"]


def test_what_triton_runs_lies_in_a_folder_of_mode_700_whatever_the_umask(here):
    script = f"umask 002; cd {ROOT}; . slurm/preamble.sh; echo $TRITON_CACHE_DIR"

    def said(**more: str) -> subprocess.CompletedProcess[str]:
        env = environment(here, **more)
        return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)

    folder = here / "c" / f"triton-{os.getuid()}"
    assert said().stdout.strip() == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    assert said().returncode == 0
    (here / "link").symlink_to(folder)
    (here / "loose").mkdir()
    (here / "loose").chmod(0o775)
    (here / "file").touch(0o600)
    for name in ("loose", "link", "file/below"):
        done = said(TRITON_CACHE_DIR=str(here / name))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nobody else can write to" in done.stderr
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        assert said().returncode == 2
