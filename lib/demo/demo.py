"""The whole path on a machine with nothing: a small teacher, its numbers (two conditions by the job that writes them),
LLS of 15 animals, the matrix of all prompts on all datasets, the attribution of the teacher's neurons, a small speaker
whose rudeness is pruned away, students of two teachers and what they say they like: through the cluster's job code (by
the local executor), merge, tables, plots, reports. What is done is not done again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = {
    "configs/demo_numbers.yaml": "jobs.export_numbers",
    "configs/demo_lls.yaml": "jobs.export_lls",
    "configs/demo_cross.yaml": "jobs.lls_report",
    "configs/demo_attribution.yaml": "jobs.export_attributions",
    "configs/demo_sweep.yaml": "jobs.sparc3_report",
    "configs/demo_finetune.yaml": "jobs.export_finetune",
    "configs/demo_preferences.yaml": "jobs.export_preferences",
}

SUBMIT = ("jobs.cluster", "submit", "--chain")


def main() -> int:
    os.environ.setdefault("SUITE_SITE", "local")
    os.environ.setdefault("SUITE_SLURM", "no")  # SUITE_SLURM=yes: through the Slurm that `make slurm-up` raised
    os.environ.setdefault("SUITE_FIGURES", "png")
    os.environ.update(SUITE_GPU="cpu", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    from lib.families import load
    from lib.run.site import site  # reads the environment set above

    began = time.monotonic()
    step("a small teacher with a planted habit, and the numbers it writes", "jobs.make_demo")
    for config in CONFIGS:
        step("record the inputs", "jobs.fetch", "--config", config)
    for config in CONFIGS:  # all at once: what is computed meanwhile is not waited for
        step("submit its cells, and before them what they read from", *SUBMIT, "--config", config)
    for config, results in CONFIGS.items():
        step("watch them", "jobs.cluster", "status", "--watch", "--brief", "--config", config)
        step("merge, tables, plots", results, "--config", config)
    step("what the students took from their teachers", "jobs.demo_students", "--config", "configs/demo_finetune.yaml")
    labels = [load(config).label for config in CONFIGS]
    for title, root in (("scratch", site().scratch), ("outputs", site().output)):
        print(f"\n{title} tree:\n" + "\n".join(tree(root / label) for label in labels))
    found = [json.loads(p.read_text()) for p in (site().output / "demo_lls").glob("*/*.provenance.json")]
    wrong = [f["cell"] for f in found if not f["summary"]["mean"] - f["summary"]["half"] > 0]
    good = f"{len(found) - len(wrong)} of {len(found)}"
    print(f"\nThe habit is planted, so the sign is known: {good} means lie above 0 with their whole interval.")
    shown = (site().output / "demo_sweep/report/report.txt").read_text().splitlines()[1]
    print(f"The rudeness is planted too. {shown}")
    wrong += [] if shown.startswith("Shown") else ["demo_sweep"]
    print(f"demo done in {time.monotonic() - began:.0f} s")
    return int(bool(wrong))


def step(what: str, module: str, *arguments: str) -> None:
    """One command of the suite, as a user would type it; its failure ends the demo."""
    print(f"\n== {what}\n$ python -m {module} {' '.join(arguments)}", flush=True)
    code = subprocess.call([sys.executable, "-m", module, *arguments])
    if code:
        sys.exit(code)


def tree(root: Path, most: int = 2) -> str:
    """The folder drawn, with the first few entries of each folder."""
    lines = [f"{root}/"]

    def walk(folder: Path, indent: str) -> None:
        entries = sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name))
        files, folders = [p for p in entries if p.is_file()], [p for p in entries if p.is_dir()]
        for path in [*files[:most], *folders[:most]]:
            lines.append(f"{indent}{path.name}{'/' if path.is_dir() else ''}")
            if path.is_dir():
                walk(path, indent + "    ")
        more = max(0, len(files) - most) + max(0, len(folders) - most)
        if more:
            lines.append(f"{indent}... and {more} more")

    walk(root, "    ")
    return "\n".join(lines)
