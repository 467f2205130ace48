"""env/slurm-up.sh raises a Slurm that behaves, and env/slurm-down.sh leaves nothing of it."""

import getpass
import os
import shutil
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
    wait_until(lambda: all(out.read_text() for out in tmp_path.glob("*.out")), 10, "a task that has begun says nothing")
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


def listening(box: Slurm) -> dict[int, str]:
    """Address by port of what listens on the ports of a Slurm's daemons."""
    first = int(box.run("scontrol", "show", "config").partition("SlurmctldPort")[2].split()[1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = {
        int(at[9:], 16): socket.inet_ntoa(bytes.fromhex(at[:8])[::-1]) for _, at, _, state, *_ in rows if state == "0A"
    }
    return {port: address for port, address in found.items() if first <= port < first + 8}


def test_no_daemon_listens_on_every_address(slurm: Slurm) -> None:
    found = listening(slurm)  # slurmctld, slurmdbd, three slurmd
    assert len(found) == 5 and "0.0.0.0" not in found.values(), found


def in_namespace(kind: str, prepare: str, folder: Path, *options: str) -> None:
    """Raise a Slurm in a namespace of its own kind, run a job there, lower it; `folder`/said has what was said."""
    up = f"{ROOT}/env/slurm-up.sh --dir {folder} --test --gpus 0 --cpus 2 --memory 2000 {' '.join(options)}"
    check = f"cat /proc/net/tcp >{folder}/tcp; srun -n1 bash -c 'hostname; echo $SLURM_CONF'"
    script = f"{prepare}; {up} && . {folder}/env.sh && {{ {check}; }}; {ROOT}/env/slurm-down.sh --dir {folder}"
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(["unshare", *user, kind, "bash", "-c", script], text=True, capture_output=True, check=False)
    (folder / "said").write_text(done.stdout + done.stderr)
    assert done.returncode == 0 and processes_of(folder) == [], done.stdout + done.stderr


def test_a_host_whose_name_stands_for_no_address() -> None:
    """Its daemons get a name of their own, or they would listen on every address."""
    with tempfile.TemporaryDirectory(prefix="suite-", dir=TMP) as name:
        in_namespace("--uts", "hostname nosuch", Path(name), "--port", "19300")
        assert f"localhost\n{name}/etc/slurm.conf\n" in Path(name, "said").read_text()
        rows = [line.split() for line in Path(name, "tcp").read_text().splitlines()[1:]]
        ours = {at[:8] for _, at, _, state, *_ in rows if state == "0A" and 19300 <= int(at[9:], 16) < 19303}
        assert ours == {"0100007F"}


def test_a_machine_with_cgroup2_alone_and_no_service_manager() -> None:
    alone = "! mountpoint -q /sys/fs/cgroup/unified || mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup"
    with tempfile.TemporaryDirectory(prefix="suite-", dir=TMP) as name:
        in_namespace("--mount", alone, Path(name), "--port", "19400", "--no-accounting")


def up_to_the_ports(repo: Path, *options: object) -> str:
    """What slurm-up says that finds its ports in use: by then it has chosen its folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [repo / "env/slurm-up.sh", "--test", "--port", server.getsockname()[1], *options]
        return subprocess.run(
            [str(word) for word in command], text=True, capture_output=True, check=False
        ).stderr.strip()


def test_a_folder_that_somebody_else_could_have_made_is_not_used(tmp_path: Path) -> None:
    repo = tmp_path / ("deep" * 20)
    shutil.copytree(ROOT / "env", repo / "env")
    link, chosen = repo / ".slurm", []
    try:
        for _ in range(2):
            assert "is in use" in up_to_the_ports(repo)
            chosen.append(link.readlink())
        assert chosen[0] == chosen[1] and chosen[0].parent == TMP, "it is remembered"
        assert chosen[0].name != f"slurm-{getpass.getuser()}", "anybody can guess that name, and make it first"
        (chosen[0] / "env.sh").write_text("export SLURM_CONF=/planted\n")
        source = ["bash", "-c", f". {repo}/env/own-slurm.sh; echo $SLURM_CONF"]
        env = {k: v for k, v in os.environ.items() if k != "SLURM_CONF"}
        assert subprocess.check_output(source, env=env, text=True) == "/planted\n"
        chosen[0].chmod(0o777), (chosen[0] / "env.sh").chmod(0o666)
        assert subprocess.check_output(source, env=env, text=True) == "\n"
        assert "is in use" in up_to_the_ports(repo)
        chosen.append(link.readlink())
        assert chosen[2] != chosen[0] and chosen[2].stat().st_mode & 0o022 == 0
        link.unlink()
        link.symlink_to(tmp_path / "link")
        (tmp_path / "link").symlink_to(chosen[2])
        assert "is in use" in up_to_the_ports(repo)
        chosen.append(link.readlink())
        assert chosen[3] not in (chosen[2], tmp_path / "link")
    finally:
        for folder in chosen:
            shutil.rmtree(folder, ignore_errors=True)


def test_a_dir_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="suite-", dir=TMP) as name:
        Path(name).chmod(0o775)
        assert "is not a folder of yours that nobody else can write to; chmod go-w it" in up_to_the_ports(
            ROOT, "--dir", name
        )
        if os.geteuid() == 0:
            Path(name).chmod(0o755)
            os.chown(name, 12345, 12345)
            assert "is not a folder of yours" in up_to_the_ports(ROOT, "--dir", name)
            os.chown(name, 0, 0)


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
