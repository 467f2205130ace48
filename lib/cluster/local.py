"""A box without Slurm: submitit's local executor, one worker a free GPU, and a queue of cells that the workers share.

Each worker takes the next unclaimed cell and runs the same batch script that Slurm would run, so a slow cell holds up
one worker and nobody else. submitit's own local executor has no queue: it would start all cells at once on GPU 0."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.base.atomic import own_folder, read_json, write_json
from lib.base.errors import REQUEUE, UserError, exit_with
from lib.base.process import HOST, pid_started
from lib.base.typed import Mistyped, parse
from lib.run.site import ROOT

FOREVER_MIN = 60 * 24 * 365  # submitit wants a limit; a shard is committed every minute, so none is needed
BUSY_MIB = 2000  # a GPU with more than this in use belongs to somebody


@dataclass(frozen=True)
class Plan:
    """What a queue's workers do."""

    command: list[str]  # the batch script and what it is called with
    cells: list[int]
    label: str
    gpus: int  # a task
    workers: int


@dataclass(frozen=True)
class Dispatcher:
    """Who waits for the workers of a queue."""

    pid: int
    pid_started: str
    host: str


def read_plan(queue: Path) -> Plan:
    """Of a queue that nobody else can have written."""
    try:
        return parse(Plan, read_json(own_folder(queue) / "plan.json"))
    except Mistyped as e:
        raise UserError(f"{queue / 'plan.json'} cannot be read ({e}); submit again") from None


def start(folder: Path, job: str, plan: Plan, env: dict[str, str], held: int) -> None:
    """Leave a dispatcher behind that outlives this shell, and return. It holds on to `held` until it can be seen."""
    queue = own_folder(folder / "queue" / job)  # what lies there is executed: the plan's command, submitit's pickles
    write_json(queue / "plan.json", asdict(plan))
    with (queue / "dispatcher.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "lib.cluster.local", str(queue), str(held)],
            pass_fds=(held,),
            cwd=ROOT,
            env={**env, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    for _ in range(100):  # until it has said who it is, so that the next command sees it
        if (queue / "dispatcher.json").exists():
            return
        time.sleep(0.1)
    raise UserError(f"the local workers did not start; see {queue / 'dispatcher.log'}")


def dispatch(queue: Path, held: int) -> None:
    """Start one worker a free GPU (the site's throttle where a task needs none) and wait for them."""
    from submitit.local.local import LocalExecutor

    plan = read_plan(queue)
    write_json(queue / "dispatcher.json", asdict(Dispatcher(os.getpid(), pid_started(os.getpid()), HOST)))
    os.close(held)
    gpus = free_gpus(plan.gpus) if plan.gpus else [""] * plan.workers
    executor = LocalExecutor(queue / "submitit")
    executor.update_parameters(timeout_min=FOREVER_MIN, stderr_to_stdout=True)
    jobs = [executor.submit(work, str(queue), gpu) for gpu in gpus[: len(plan.cells)]]
    failed = [cell for job in jobs for cell in job.result()]
    print(f"all workers have ended; cells that failed: {failed or 'none'}", flush=True)


def work(queue_path: str, gpu: str) -> list[int]:
    """Take cells until none is left; returns those that failed."""
    queue = Path(queue_path)
    plan = read_plan(queue)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it; a worker must be able to end
    failed = []
    for index in plan.cells:
        if (queue / "cancelled").exists():
            break
        try:
            (queue / f"cell-{index}").mkdir()  # exactly one worker succeeds
        except FileExistsError:
            continue
        log = ROOT / "slurm" / "logs" / f"{plan.label}-{queue.name}_{index}.out"
        env = {**os.environ, "SUITE_LOG": str(log), "SLURM_ARRAY_TASK_ID": str(index), "SLURM_SUBMIT_DIR": str(ROOT)}
        env["CUDA_VISIBLE_DEVICES"] = gpu
        code = REQUEUE
        with log.open("ab") as out:
            while code == REQUEUE and not (queue / "cancelled").exists():
                code = subprocess.call(["bash", *plan.command], cwd=ROOT, env=env, stdout=out, stderr=out)
        (queue / f"cell-{index}" / "exit").write_text(f"{code}\n")
        if code:
            failed.append(index)
    return failed


def free_gpus(per_task: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES values, one for each task that fits beside what runs already."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as e:
        raise UserError(
            f"nvidia-smi does not run here ({e}) and a task needs {per_task} GPU; run.gpus=0 means none"
        ) from None
    rows = [line.split(",") for line in out.splitlines() if "," in line]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    free = [i.strip() for i, used in rows if int(used) < BUSY_MIB and (not allowed or i.strip() in allowed.split(","))]
    if len(free) < per_task:
        raise UserError(
            f"{len(free)} of {len(rows)} GPUs are free and a task needs {per_task}; wait, or end what uses them"
        )
    return [",".join(free[i : i + per_task]) for i in range(0, len(free) - per_task + 1, per_task)]


def tasks(folder: Path) -> dict[int, tuple[str, str]]:
    """Cells in the hands of a living dispatcher: PENDING in its queue, or RUNNING, with the queue's name."""
    found: dict[int, tuple[str, str]] = {}
    for queue in sorted((folder / "queue").glob("local-*")):
        try:
            who = parse(Dispatcher, read_json(queue / "dispatcher.json"))
            plan = parse(Plan, read_json(queue / "plan.json"))
        except Mistyped:
            continue
        alive = who.host == HOST and pid_started(who.pid) == who.pid_started != ""
        for index in plan.cells if alive else []:
            claim = queue / f"cell-{index}"
            if claim.exists() and not (claim / "exit").exists():
                found[index] = ("RUNNING", queue.name)
            elif not claim.exists() and not (queue / "cancelled").exists():
                found[index] = ("PENDING", queue.name)
    return found


def cancel(folder: Path) -> list[str]:
    """No worker takes another cell. Returns the queues that were still alive."""
    names = sorted({name for _, name in tasks(folder).values()})
    for queue in (folder / "queue").glob("local-*"):
        with suppress(OSError):
            (queue / "cancelled").touch()
    return names


if __name__ == "__main__":
    exit_with(lambda: dispatch(Path(sys.argv[1]), int(sys.argv[2])))
