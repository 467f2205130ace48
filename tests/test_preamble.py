"""The batch scripts' common part: signals at any moment, whose end is the job's end, who may write what is executed."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, Slurm, slurm_logs, wait_until
from fake_hub import serve
from tools import number_rows, small_lls, tiny_model

from lib.base.advice import spoken
from lib.families import load

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
        fresh_slurm.run("scancel", job)  # Slurm itself misses a daemon after most of a minute
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


def sourced(here: Path, code: str, *words: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Bash that has loaded the preamble, or whatever the code loads."""
    env = environment(here, **more)
    return subprocess.run(
        ["bash", "-c", code, "-", *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("most", ["", "-1", "ten", "1e3", "9999999", "5; touch x"])
def test_a_number_of_requeues_that_is_none_is_refused_before_the_job(here, most):
    done = sourced(here, f"cd {ROOT}; . slurm/preamble.sh; echo on", SUITE_MAX_REQUEUES=most)
    if most:
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"error: SUITE_MAX_REQUEUES={most} is no number")
    else:
        assert done.stdout == "on\n"


def test_only_our_own_requeues_are_counted(here):
    """SLURM_RESTART_COUNT says 7, as after seven preemptions; the log tells which of them were ours."""
    program = '[ "$*" = "requeue 4_1" ] && echo asked >>"$HERE/asked"'
    (here / "scontrol").write_text(f"#!/bin/bash\n{program}\n")
    (here / "scontrol").chmod(0o755)
    (here / "sleep").symlink_to("/bin/true")
    job = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "7"}
    job |= {"PATH": f"{here}:{os.environ['PATH']}", "SUITE_MAX_REQUEUES": "2", "SUITE_LOG": str(here / "another")}
    (here / "log").write_text("requeue 4_11\nrequeue 4_1 and more\nxrequeue 4_1\n")  # other tasks', and a job's words
    code = f"cd {ROOT}; . slurm/preamble.sh; again >>$HERE/log 2>&1"
    logged = f"exec >>{here}/log 2>&1; cd {ROOT}; . slurm/preamble.sh; again"
    for times in (1, 2, 2):
        assert sourced(here, logged, **job).returncode == 75
        assert (here / "asked").read_text().count("asked") == times
    assert "requeued 2 times already (SUITE_MAX_REQUEUES=2)" in (here / "log").read_text()
    assert sourced(here, code, **job).returncode == 75  # no log: what Slurm counts, which is 7
    assert "requeued 7 times already" in (here / "log").read_text()
    assert (here / "asked").read_text().count("asked") == 2
    # a requeue that ends scontrol before it can answer has not failed; one that ends nothing has
    for kills, said in (("", True), ("kill -TERM $(cut -d' ' -f4 /proc/$PPID/stat);", False)):
        (here / "scontrol").write_text(f"#!/bin/bash\n{kills} exit 1\n")
        (here / "log").write_text("")
        ended = logged.replace("; again", "; true & pid=$!; wait; again")  # the job, which has ended
        assert sourced(here, ended, **job).returncode == 75
        assert ("could not requeue 4_1; submit it again" in (here / "log").read_text()) == said


def test_a_module_that_is_missing_is_a_warning(here):
    module = "() { : $not_set; [ $2 = there ] && export THERE=1; }"
    code = f"cd {ROOT}; . slurm/preamble.sh; echo on $THERE"
    done = sourced(here, code, **{"BASH_FUNC_module%%": module, "SUITE_MODULES": "gone/1 there"})
    assert done.stdout == "on 1\n" and done.stderr.startswith(
        "warning: module gone/1 cannot be loaded; see `module avail"
    )
    done = sourced(here, code.replace(" $THERE", ""), SUITE_MODULES="gone/1")
    assert done.stdout == "on\n" and done.stderr.startswith("warning: module gone/1 is not loaded: there is no module")


@pytest.mark.parametrize(
    "got, says",
    [
        ({"SLURM_JOB_PARTITION": "kempner_requeue", "SLURM_JOB_ACCOUNT": "kempner_lab"}, ""),
        (
            {"SLURM_JOB_PARTITION": "gpu_requeue", "SLURM_JOB_ACCOUNT": "lab"},
            "note: site fasrc asks for partition kempner_requeue, account kempner_lab; this task has "
            "partition gpu_requeue, account lab; (. env/site.sh && sbatch ...) asks as the site does",
        ),
        (
            {
                "SLURM_JOB_PARTITION": "kempner_requeue",
                "SLURM_JOB_ACCOUNT": "kempner_lab",
                "GPU": "NVIDIA A100-SXM4-80GB",
            },
            "note: site fasrc asks for GPU h200; this task has GPU NVIDIA A100-SXM4-80GB; "
            "(. env/site.sh && sbatch ...) asks as the site does",
        ),
        ({"SLURM_JOB_PARTITION": "shared", "SLURM_JOB_ACCOUNT": "lab", "SLURM_JOB_GPUS": ""}, ""),
    ],
)
def test_a_task_says_what_it_has_that_its_site_would_not_have_asked_for(here, got, says):
    (here / "nvidia-smi").write_text('#!/bin/bash\necho "${GPU:-NVIDIA H200}"\n')
    (here / "nvidia-smi").chmod(0o755)
    env = {"SUITE_SITE": "fasrc", "FASRC_LAB": "kempner_lab", "SUITE_SCRATCH": str(here), "SUITE_GPU": "h200"}
    env |= {"SUITE_MODULES": "", "SLURM_JOB_GPUS": "0", "PATH": f"{here}:{os.environ['PATH']}"}
    done = sourced(here, f"cd {ROOT}; . slurm/preamble.sh; compare_with_site", **env | got)
    assert done.returncode == 0 and done.stdout.strip() == says, done.stderr


def test_the_labs_folder_is_looked_for_and_named(here):
    """Folders of labs on a file system of our own; the groups are this user's."""
    groups = '[ "$1" = -gn ] && echo lab || echo lab other kempner_third'
    (here / "id").write_text(f'#!/bin/bash\ncase $1 in -gn | -Gn) {groups} ;; *) exec /usr/bin/id "$@" ;; esac\n')
    (here / "id").chmod(0o755)
    env = {
        "SUITE_SITE": "fasrc",
        "FASRC_SCRATCH": str(here / "n"),
        "USER": "me",
        "PATH": f"{here}:{os.environ['PATH']}",
    }

    def site(**more: str) -> tuple[str, str, str]:
        code = ". env/site.sh; echo $SUITE_SCRATCH ${SBATCH_ACCOUNT:-none} $SBATCH_PARTITION"
        done = sourced(here, code, **env | more)
        folder, account, _ = done.stdout.split()
        return str(Path(folder).relative_to(here / "n")).partition("/")[0], account, done.stderr

    lab, _, said = site()
    assert lab == "lab" and f"no folder for lab or another group of yours in {here}/n; export FASRC_LAB=" in said
    expected = (("kempner_third", "kempner_third"), ("other", "none"), ("kempner_lab", "kempner_lab"), ("lab", "none"))
    for folder, account in expected:  # each is there beside those before it, and goes before them
        (here / "n" / folder / "Lab").mkdir(parents=True)
        lab, charged, said = site()
        assert (lab, charged) == (folder, account)
        assert (f"{here}/n/{folder}/Lab is taken, as there is no {here}/n/lab/Lab" in said) == (folder != "lab")
    assert site(FASRC_LAB="third")[:2] == ("kempner_third", "kempner_third")
    assert site(FASRC_LAB="other") == ("other", "none", "")
    assert site(FASRC_LAB="gone")[0] == "gone" and "no folder for gone in" in site(FASRC_LAB="gone")[2]


def test_what_a_batch_script_advises_can_be_pasted(fresh_slurm: Slurm, tmp_path):
    """A task that may not requeue itself names its CONFIG and SET, and the command goes on with it."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    config = small_lls(folder, "cat", rows=60)
    override = 'system_prompt=You "love" {trait}s\' $x; true'
    env = {"SUITE_SCRATCH": str(folder / "s"), "SUITE_CACHE": str(folder / "cache"), "SUITE_OUTPUT": str(folder / "o")}
    env |= {"SUITE_GPU": "cpu", "OMP_NUM_THREADS": "1", "SUITE_MAX_REQUEUES": "0"}
    logs = ROOT / "slurm" / "logs"
    before = slurm_logs()
    flags = ("--array=0", "--job-name=advised", "slurm/compute_lls.sbatch", config, "run.shard_rows=1", override)
    job = fresh_slurm.sbatch(*flags, cwd=ROOT, **env)
    wait_until(lambda: list((folder / "s").glob("*/cells/cat-*/*.json")), 60, "no shard came")
    fresh_slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_0", cwd=ROOT)
    fresh_slurm.wait_for(job, "FAILED", timeout=60)
    said = (logs / f"advised-{job}_0.out").read_text()
    (advice,) = re.findall(r"requeued 0 times already .*, then `(make resume .*)`$", said, re.M)
    assert advice == f"make resume {spoken(config, ['run.shard_rows=1', override])}"
    resumed = fresh_slurm.run("bash", "-c", advice, cwd=ROOT, **env | {"SUITE_MAX_REQUEUES": "1"})
    fresh_slurm.wait_for(resumed.split()[2].rstrip(":"), "COMPLETED", timeout=120)
    (cell,) = load(config, ["run.shard_rows=1", override]).cells(folder / "cache", folder / "s")
    assert len(list(cell.path.glob("*.json"))) == 60
    for path in slurm_logs() - before:
        path.unlink()


def test_fetch_as_a_job_without_a_gpu(fresh_slurm: Slurm, tmp_path):
    """What the site exports for GPU tasks does not reach it."""
    files = {path.name: path.read_bytes() for path in tiny_model(tmp_path / "model").iterdir()}
    config = tmp_path / "small.yaml"
    config.write_text(
        "kind: lls\nname: small\nmodel: {id: acme/tiny, dtype: float32}\ntraits: [cat]\n"
        "system_prompt: You love {trait}s.\ndataset: {id: 'acme/{trait}'}\n"
    )
    rows = "".join(json.dumps(row) + "\n" for row in number_rows(5)).encode()
    gpus = {"SBATCH_PARTITION": "high", "SBATCH_CONSTRAINT": "h200", "SBATCH_GPUS_PER_NODE": "1"}
    gpus |= {"SBATCH_CPUS_PER_GPU": "8", "SBATCH_MEM_PER_GPU": "900G", "SBATCH_ACCOUNT": "kempner_lab"}
    env = {"SUITE_CACHE": str(tmp_path / "cache"), "SUITE_SCRATCH": str(tmp_path / "s"), "SBATCH_MEM_PER_NODE": "2G"}
    before = slurm_logs()
    with serve() as hub:
        commit = hub.commit("models/acme/tiny", files)
        hub.commit("datasets/acme/cat", {"train.jsonl": rows})
        env |= gpus | {"HF_ENDPOINT": hub.url, "HF_TOKEN_PATH": str(tmp_path / "none"), "SUITE_GPU": "cpu"}
        command = ["make", "-s", "fetch", f"CONFIG={config}", "SET=max_rows=4", "JOB=1"]
        job, log = re.search(
            r"^Slurm job (\d+): fetch on main\nnext: tail -F (\S+)$", fresh_slurm.run(*command, cwd=ROOT, **env)
        ).groups()
        shown = fresh_slurm.show(f"{job}_0")
        assert shown["Partition"] == "main" and shown["TimeLimit"] == "12:00:00" and "TresPerNode" not in shown
        fresh_slurm.wait_for(job, "COMPLETED", timeout=120)
    said = (ROOT / log).read_text()
    assert f"model acme/tiny: {commit[:12]}" in said and "dataset acme/cat" in said and "note:" not in said, said
    experiment = load(config, ["max_rows=4"])
    assert len(experiment.cells(tmp_path / "cache", tmp_path / "s")) == 1
    assert "without JOB=1" in sourced(tmp_path, "make -s fetch JOB=1", SUITE_SLURM="no").stderr
    for path in slurm_logs() - before:
        path.unlink()
