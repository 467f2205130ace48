"""What Slurm says, as typed values: the queue, the accounts, the limits; and array specifications."""

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lib.base.errors import UserError
from lib.run.site import site

DEFAULT_MAX_ARRAY = 1001  # Slurm's own default MaxArraySize


@dataclass(frozen=True)
class Queued:
    """One task in squeue: `array` is the array's id (or the job's own), `index` the cell or None."""

    array: str
    index: int | None
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str
    node: str
    name: str
    cells: tuple[str, ...] = ()  # that share the task
    tasks: str = ""  # what its array's tasks are, by lib.run.task.freeze

    @property
    def held(self) -> bool:
        """It waits for somebody to release it, for ever: Slurm does this by itself, after a launch that failed."""
        return self.state == "PENDING" and ("held" in self.reason.lower() or self.reason.startswith("JobHold"))

    @property
    def id(self) -> str:
        return self.array if self.index is None else f"{self.array}_{self.index}"


@dataclass(frozen=True)
class Account:
    """One finished or running task in sacct."""

    id: str
    state: str
    elapsed: int  # seconds, summed over its runs
    gpus: int
    max_rss: str
    exit_code: str
    memory: str = ""  # asked for


def has_slurm() -> bool:
    """Whether tasks go to Slurm. Where the site says so, an sbatch that is not found is an error, not a box without."""
    return site().env.get("SUITE_SLURM") != "no"


def ask(*command: str, timeout: float = 30) -> str:
    """The output of a Slurm command; a UserError when it does not answer, or not whole, or not in text."""
    conf = {k: v for k, v in site().env.items() if k == "SLURM_CONF"}  # of the Slurm that `make slurm-up` raised
    # a user's SQUEUE_STATES or SACCT_FORMAT would leave out what we have to see
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    try:
        done = subprocess.run(command, env={**conf, **own}, capture_output=True, timeout=timeout, check=False)
    except OSError as e:
        raise UserError(f"{command[0]} does not run here ({e.strerror}); use a login node, or SUITE_SLURM=no") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} gave no answer in {timeout:.0f} s: is the controller down? (scontrol ping)"
        ) from None
    complaint = _last(done.stderr.decode(errors="replace"))
    partial = command[0] == "squeue" and "error:" in complaint  # exit code 0, and one cluster of several did not answer
    if done.returncode or partial:
        raise UserError(f"{command[0]}: {complaint or f'exit code {done.returncode}'}")
    try:
        return done.stdout.decode()
    except UnicodeDecodeError:
        raise unreadable(command[0]) from None


def unreadable(command: str) -> UserError:
    return UserError(f"{command} answered what cannot be read; see what `{command}` shows, and try again")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# A user's other jobs may have any name, so records and fields are parted by what no name holds.
RECORD, FIELD = "\x1e", "\x1f"
ANYTHING = r"(?s:.*)"
FIELDS = (r"\d+", r"\d+|N/A", r"[A-Z_]+", r"[^\n]*", r"\S*", ANYTHING, ANYTHING)
TASKS = "suite-tasks:"  # in a job's comment, before what names its tasks: known even where no record could be written


def queue(*only: str) -> list[Queued]:
    """All tasks of this user that are pending or running, arrays taken apart; `only`: what narrows or widens that."""
    out = ask(
        "squeue", "--me", "-a", "-h", "-r", *only, "-o", RECORD + FIELD.join(("%F", "%K", "%T", "%r", "%N", "%k", "%j"))
    )
    return parse_queue(out)


def parse_queue(out: str) -> list[Queued]:
    """A UserError for an answer that is not whole: half a queue would be taken for an empty one."""
    before, *records = out.split(RECORD)
    if before.strip() or (records and not out.endswith("\n")):
        raise unreadable("squeue")
    tasks = []
    for record in records:
        fields = [field.strip() for field in record.split(FIELD)]
        if len(fields) != len(FIELDS) or not all(map(re.fullmatch, FIELDS, fields)):
            raise unreadable("squeue")
        array, index, state, reason, node, comment, name = fields
        named = comment.removeprefix(TASKS) if comment.startswith(TASKS) else ""
        tasks.append(Queued(array, int(index) if index.isdigit() else None, state, reason, node, name, tasks=named))
    return tasks


def known(job: str) -> list[Queued]:
    """Tasks of one job that Slurm still knows, ended ones too; empty for a job that it does not know (yet)."""
    try:
        return queue("-t", "all", "-j", job)
    except UserError:
        return []


def accounts(arrays: Iterable[str], timeout: float = 10) -> dict[str, Account]:
    """sacct's figures by task id; empty where there is no accounting. A requeued task has several runs."""
    ids = sorted(set(arrays))
    if not ids:
        return {}
    try:
        out = ask(
            *("sacct", "-n", "-P", "--duplicates", "-j", ",".join(ids)),
            *("-o", "JobID,State,ElapsedRaw,AllocTRES,MaxRSS,ExitCode"),
            timeout=timeout,
        )
    except UserError:
        return {}
    return parse_sacct(out)


def parse_sacct(out: str) -> dict[str, Account]:
    found: dict[str, Account] = {}
    for line in out.splitlines():
        fields = line.split("|")
        if len(fields) != 6 or not fields[1].strip() or not fields[2].isdecimal():
            continue
        job, state, elapsed, tres, rss, code = fields
        base, _, step = job.partition(".")
        if "[" in base:  # the pending rest of an array
            continue
        was = found.get(base)
        gpus = re.search(r"gres/gpu=(\d+)", tres)
        if step:
            if was and size(rss) > size(was.max_rss):
                found[base] = replace(was, max_rss=rss)
        else:
            total = (was.elapsed if was else 0) + int(elapsed)
            count = int(gpus[1]) if gpus else was.gpus if was else 0
            memory, rss = re.search(r"\bmem=(\w+)", tres), was.max_rss if was else ""
            found[base] = Account(base, state.split()[0], total, count, rss, code, memory[1] if memory else "")
    return found


def size(text: str) -> float:
    """'161548K' -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text)
    return float(match[1]) * 1024 ** " KMGT".index(match[2] or " ") if match else 0.0


def max_array_size() -> int:
    """The largest array index + 1 that the controller takes."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.M)
    return int(match[1]) if match else DEFAULT_MAX_ARRAY


def parse_array(spec: str, cells: int) -> list[int]:
    """'0-14', '3,7-9', '0-14:2', '0-14%4' -> indices, each one of the experiment's cells."""
    found: set[int] = set()
    for part in spec.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6})(?::(\d{1,6}))?)?", part.strip())
        if not match:
            raise UserError(f"ARRAY={spec}: '{part}' is not a number or a range; write e.g. 0-14 or 3,7-9")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step < 1:
            raise UserError(f"ARRAY={spec}: '{part}' runs backwards or stands still; write e.g. 0-14 or 0-14:2")
        if last >= cells:
            raise UserError(f"ARRAY={spec}: the experiment has cells 0-{cells - 1}")
        found.update(range(first, last + 1, step))
    return sorted(found)


def throttle_of(spec: str) -> int | None:
    """The 4 of '0-14%4'."""
    _, percent, number = spec.partition("%")
    if not percent:
        return None
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"ARRAY={spec}: after % comes how many tasks may run at once, e.g. 0-14%4")
    return int(number)


def format_array(indices: Iterable[int]) -> str:
    """[0,1,2,5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def clean_environment(env: dict[str, str]) -> dict[str, str]:
    """Without the variables of a job or a make that we may be inside of: they would leak into the one we submit."""
    inside = ("SLURM_JOB", "SLURM_ARRAY", "SLURM_STEP", "SUITE_ARG_", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    return {k: v for k, v in {**os.environ, **env}.items() if not k.startswith(inside)}
