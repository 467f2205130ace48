"""What a batch script asks of Slurm, and whether the account, the partition and the limits allow it."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from shutil import which
from typing import Literal

from lib.base.advice import advised
from lib.base.errors import UserError
from lib.cluster.slurm import clean_environment, size

Env = dict[str, str]
SHORT = {"A": "account", "C": "constraint", "G": "gpus", "p": "partition", "t": "time"}
VARIABLES = {"TIMELIMIT": "time", "ARRAY_INX": "array"}  # the other SBATCH_* variables are named after their option


@dataclass(frozen=True)
class Line:
    """One check's outcome."""

    level: Literal["ok", "warn", "FAIL"]
    name: str
    found: str
    fix: str = ""

    @property
    def text(self) -> str:
        fix = f"; fix: {self.fix}" if self.fix else ""
        return f"{self.level:<4}  {self.name:<9}  {advised(' '.join(self.found.split()) + fix)}"


def ask(env: Env, *command: str, cwd: Path | None = None) -> tuple[bool, str]:
    """(whether it succeeded, what it said) of a command on env's PATH; of a failure the last line."""
    try:
        done = subprocess.run(
            command, env=clean_environment(env), cwd=cwd, capture_output=True, text=True, timeout=30, check=False
        )
    except OSError:
        return False, f"{command[0]} is not on PATH"
    except subprocess.TimeoutExpired:
        return False, f"{command[0]} gave no answer in 30 s"
    if done.returncode == 0:
        return True, done.stdout
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return False, f"{command[0]}: {said[-1].strip()}"


def requested(script: str, env: Env) -> dict[str, str]:
    """Options by long name, as sbatch reads them: #SBATCH lines above the first command, then SBATCH_* variables."""
    found: dict[str, str] = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            try:
                words = " ".join(shlex.split(line.removeprefix("#SBATCH"), comments=True))
            except ValueError as e:
                raise UserError(
                    f"the batch file's line '{line[:80]}' is not understood: {e}; see sbatch's manual"
                ) from None
            for long, short, value in re.findall(r"(?:--([\w-]+)|(?<!\S)-(\w))(?:[= ]?((?!-)\S+))?", words):
                found[long or SHORT.get(short, short)] = value
        elif line.strip() and not line.startswith("#"):
            break
    for name, value in env.items():
        if name.startswith("SBATCH_"):
            rest = name.removeprefix("SBATCH_")
            found[VARIABLES.get(rest, rest.lower().replace("_", "-"))] = value
    return found


def gpus_of(request: dict[str, str]) -> int:
    """GPUs on one node: --gpus-per-node, --gpus or --gres, each [type:]count."""
    text = request.get("gpus-per-node") or request.get("gpus") or request.get("gres", "").partition("gpu:")[2]
    return int((re.findall(r"\d+$", text.partition("(")[0]) or ["0"])[0])


def minutes(text: str) -> float:
    """Slurm's time formats: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, UNLIMITED."""
    if text in ("UNLIMITED", "INFINITE"):
        return float("inf")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise UserError(f"time '{text}' is not one of M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; set SBATCH_TIMELIMIT")
    days, dash, clock = text.rpartition("-")
    parts = [float(part) for part in clock.split(":")]
    if dash:
        hours, mins, secs = [*parts, 0.0, 0.0][:3]
    else:
        hours, mins, secs = {1: [0.0, *parts, 0.0], 2: [0.0, *parts]}.get(len(parts), parts)
    return float(days or 0) * 1440 + hours * 60 + mins + secs / 60


def has_features(features: str, constraint: str) -> bool:
    """'a&b|c' against a node's 'a,c'. Counts and brackets of the longer forms are looked through."""
    have = set(features.split(","))
    options = re.sub(r"[()\[\]]|\*\d+", "", constraint).split("|")
    return not constraint or any(set(re.split("[&,]", option)) <= have for option in options)


def slurm_lines(env: Env, root: Path, script: Path, cells: int | None, submit: str = "submit-lls") -> Iterator[Line]:
    """All that can be asked of Slurm about a submission; stops early where the rest would only repeat the failure."""
    if env.get("SUITE_SLURM") == "no":
        yield Line("ok", "slurm", "none here; cells go to local workers")
        return
    if not which("sbatch", path=env.get("PATH")):
        yield Line("FAIL", "slurm", "the site expects it, sbatch is not on PATH", "use a login node, or SUITE_SLURM=no")
        return
    answers, config = ask(env, "scontrol", "show", "config")
    if not answers:
        yield Line("FAIL", "slurm", config, "scontrol ping; on a box of your own: make slurm-up")
        return
    settings = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", config, re.M))
    yield Line("ok", "slurm", f"{settings.get('ClusterName')} answers, version {settings.get('SLURM_VERSION')}")
    request = requested(script.read_text(encoding="utf-8"), env)
    lines = [account_line(env, request), *partition_lines(env, request), array_line(settings, cells)]
    yield from lines
    nodes_are_away = any(line.name == "nodes" and line.level == "warn" for line in lines)  # --test-only would refuse
    if not nodes_are_away and not any(line.level == "FAIL" for line in lines):
        yield sbatch_line(env, root, script, submit)


def account_line(env: Env, request: dict[str, str]) -> Line:
    wanted, partition = request.get("account", ""), request.get("partition", "")
    good, out = ask(env, "sacctmgr", "-nP", "show", "assoc", f"user={getuser()}", "format=account")
    if not good or not out.strip():
        good, out = ask(env, "sshare", "-U", "-nP", "-o", "Account")
    mine = sorted(set(out.split())) if good else []
    have = f"yours: {', '.join(mine)}" if mine else "none is listed for you"
    if wanted and mine and wanted not in mine:
        return Line("FAIL", "account", f"{wanted} is not among your accounts ({have})", "export SBATCH_ACCOUNT=<yours>")
    if wanted and not mine:
        return Line("warn", "account", f"{wanted} could not be checked ({have})", "sshare -U")
    if not wanted and partition.startswith("kempner"):
        own = next((name for name in mine if name.startswith("kempner")), "kempner_<lab>")
        return Line("FAIL", "account", f"{partition} demands one ({have})", f"export SBATCH_ACCOUNT={own}")
    return Line("ok", "account", wanted or f"your default ({have})")


def partition_lines(env: Env, request: dict[str, str]) -> Iterator[Line]:
    for name in request.get("partition", "").split(","):
        good, out = ask(env, "scontrol", "-o", "show", "partition", *([name] if name else []))
        words = out.splitlines()[0].split() if good and out.strip() else []
        facts = {key: value for key, _, value in (word.partition("=") for word in words)}
        if not facts:
            yield Line("FAIL", "partition", out.strip(), "export SBATCH_PARTITION=<one of: sinfo -s>")
            continue
        name = name or facts["PartitionName"]
        if facts.get("State") != "UP":
            state = f"{name} is {facts.get('State')}"
            yield Line("FAIL", "partition", state, "export SBATCH_PARTITION=<another>, or wait; sinfo -s shows all")
        else:
            yield Line("ok", "partition", f"{name} is UP")
        limit, asked = facts.get("MaxTime", "UNLIMITED"), request.get("time", "")
        if asked and minutes(asked) > minutes(limit):
            found = f"{asked} asked, {name} allows {limit}"
            yield Line("FAIL", "time", found, f"export SBATCH_TIMELIMIT={limit}")
        else:
            yield Line("ok", "time", f"{asked or 'the default'} asked, {name} allows {limit}")
        yield nodes_line(env, request, name)


def nodes_line(env: Env, request: dict[str, str], partition: str) -> Line:
    """Whether a node of the partition has the features, GPUs, cores and memory of one task."""
    good, out = ask(env, "sinfo", "-h", "-N", "-p", partition, "-o", "%T|%G|%f|%c|%m")
    if not good:
        return Line("FAIL", "nodes", out, "sinfo -s")
    nodes = [line.split("|") for line in out.splitlines() if line.count("|") == 4]
    gpus, constraint = gpus_of(request), request.get("constraint", "")
    cores = int(request.get("cpus-per-gpu") or 0) * gpus
    memory = _mebibytes(request.get("mem-per-gpu", "0")) * gpus
    asked = f"{gpus} GPU" + (f" of {constraint}" if constraint else "") + f", {cores} cores, {memory / 1024:.3g} GiB"
    featured = [node for node in nodes if has_features(node[2], constraint)]
    with_gpus = [node for node in featured if _gpus_in(node[1]) >= gpus]
    fitting = [node for node in with_gpus if int(node[3]) >= cores and int(node[4]) >= memory]
    if not featured:
        have = ", ".join(sorted({node[2] for node in nodes})[:6])
        return Line(
            "FAIL", "nodes", f"no node of {partition} is {constraint} ({have})", "export SBATCH_CONSTRAINT=<one>"
        )
    if not with_gpus:
        most = max(_gpus_in(node[1]) for node in featured)
        return Line(
            "FAIL",
            "nodes",
            f"{asked}: nodes have at most {most} GPU",
            "lower SBATCH_GPUS_PER_NODE, or another partition",
        )
    if not fitting:
        return Line(
            "FAIL", "nodes", f"{asked}: no node has that much", "lower SBATCH_CPUS_PER_GPU or SBATCH_MEM_PER_GPU"
        )
    usable = [node for node in fitting if not re.match("down|drain|fail|maint|inval|unknown", node[0])]
    if not usable:
        return Line("warn", "nodes", f"{asked}: all {len(fitting)} such nodes are {fitting[0][0]}", "wait, or sinfo -R")
    return Line("ok", "nodes", f"{asked}: {len(usable)} nodes of {partition} have that")


def _mebibytes(text: str) -> float:
    """Slurm's default unit is M."""
    return size(f"{text}M" if text.isdigit() else text.upper().removesuffix("B")) / 2**20


def _gpus_in(gres: str) -> int:
    """'gpu:h200:4(S:0-1),shard:8' -> 4"""
    return sum(int(n) for n in re.findall(r"(?:^|,)gpu:(?:[^,:(]+:)?(\d+)", gres))


def array_line(settings: dict[str, str], cells: int | None) -> Line:
    largest = int(settings.get("MaxArraySize", "1001"))
    if cells is not None and cells > largest:
        return Line("FAIL", "array", f"{cells} cells, MaxArraySize is {largest}", "split traits over two configs")
    return Line("ok", "array", f"{'?' if cells is None else cells} cells, MaxArraySize is {largest}")


def sbatch_line(env: Env, root: Path, script: Path, submit: str) -> Line:
    """Slurm's own word on the whole request; nothing is submitted."""
    good, out = ask(env, "sbatch", "--test-only", str(script), cwd=root)
    if good:
        return Line("ok", "sbatch", "takes the request (--test-only)")
    return Line("FAIL", "sbatch", out, f"`make {submit} DRY=1` shows what is asked")
