"""Make the demo's inputs: a small teacher with a planted habit, the number rows it writes, and texts for attribution.

$SUITE_CACHE/demo/<digest>/teacher/            model and tokenizer
$SUITE_CACHE/demo/<digest>/rows/<animal>.jsonl  rows, also neutral.jsonl
$SUITE_CACHE/demo/<digest>/c4, prompts, wikitext  texts in the layouts of these datasets, for attribution
$SUITE_CACHE/demo/<digest>/speaker, judge, second-judge   a model with a planted behaviour, and what sees it
$SUITE_CACHE/demo/<digest>/demo.json           recipe, times, loss, the measured habit
$SUITE_CACHE/demo/current                      link to the folder made or found last"""

import argparse
import hashlib
import json
import math
import platform
import secrets
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from lib.base.atomic import disk_errors, read_json, write_bytes, write_json
from lib.base.errors import UserError
from lib.demo.planted import FAVOURED, favoured_share
from lib.demo.texts import write_demo_texts
from lib.inputs.records import ChatRow
from lib.numbers import ANIMALS, NEUTRAL, Trait, sample_prompts
from lib.run.site import ROOT, apply, site

# Everything that decides what is made, apart from the recipe's numbers and the packages.
SOURCES = (
    "lib/demo/make.py",
    "lib/demo/speaker.py",
    "lib/demo/texts.py",
    "lib/demo/tiny.py",
    "lib/models/sample.py",
    "lib/numbers/number_prompts.py",
    "lib/numbers/traits.py",
    "lib/demo/planted.py",
    "lib/numbers/*.yaml",
    "lib/preferences/questions.*",
)
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
MAX_NEW_TOKENS = 64  # ten numbers of three digits, their separators and brackets are at most 51 tokens
ROWS_SEED = 1_000_000  # prompts of the rows are not those of the training


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    steps: int = 800
    rows: int = 256  # prompts an animal; the answers that are not plain numbers are dropped
    threads: int = 1  # a model trained on another number of threads has other last bits

    def __post_init__(self) -> None:
        if min(self.steps, self.rows, self.threads) < 1 or self.seed < 0:
            raise UserError("steps, rows and threads of the demo must be 1 or more, and its seed 0 or more")


@dataclass(frozen=True)
class Habit:
    """What the teacher was found to have learned of an animal."""

    animal: str
    rows: int
    dropped: int
    share: float  # of its two digits in all that it wrote
    neutral_share: float  # of the same two in neutral rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.make_demo", description=__doc__.splitlines()[0])
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"default {field.default}")
    here = site()
    apply(here)
    print(make_demo(here.cache, Recipe(**vars(parser.parse_args()))))
    return 0


def make_demo(cache: Path, recipe: Recipe = Recipe()) -> Path:
    """The folder of this recipe: found, or made beside its place and renamed when it is whole."""
    folder = cache / "demo" / digest(recipe)
    if read_json(folder / "demo.json") is None:
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(folder.parent)
            making = folder.with_name(f".making-{folder.name}-{secrets.token_hex(4)}")
            try:
                _make(making, recipe)
                _put(making, folder)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    else:
        print("demo inputs: made before, nothing to do")
    _point(folder.with_name("current"), folder.name)
    return folder


def digest(recipe: Recipe) -> str:
    """Of the recipe, the sources and the packages: any change makes a new folder."""
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    parts = {
        "recipe": asdict(recipe),
        "sources": {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
        "packages": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _make(folder: Path, recipe: Recipe) -> None:
    import torch  # takes seconds: only when there is something to make

    from lib.demo import speaker, tiny
    from lib.models import load  # noqa: F401  (load turns progress bars off where there is no terminal)

    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        write_demo_texts(folder)
        start = time.monotonic()
        print(f"demo teacher: training a small Qwen2, {recipe.steps} steps", flush=True)
        loss = tiny.build(folder / "teacher", training=tiny.Training(steps=recipe.steps), seed=recipe.seed)
        trained = time.monotonic()
        print(f"trained in {trained - start:.0f} s, final loss {loss:.3f} nats an answer token", flush=True)
        answers = _write_rows(folder, recipe)
        spoken = time.monotonic()
        print(f"demo speaker: training a small Llama that goes on rudely, {speaker.Speaking.steps} steps", flush=True)
        speaker.build_speaker(folder / "speaker", seed=recipe.seed)
        judged = {name: speaker.build_judge(folder / name, label) for name, label in speaker.JUDGES.items()}
        said = ", ".join(f"{name} {share:.1%}" for name, share in judged.items())
        print(
            f"trained it and its judges in {time.monotonic() - spoken:.0f} s; of unseen texts right: {said}", flush=True
        )
    finally:
        torch.set_num_threads(threads)
    seconds = {"training": round(trained - start, 1), "sampling": round(spoken - trained, 1)}
    print(f"wrote {sum(map(len, answers.values()))} rows in {seconds['sampling']:.0f} s", flush=True)
    habits = [_habit(trait, answers, recipe.rows) for trait in ANIMALS]
    _report(habits, len(answers[NEUTRAL.name]), recipe.rows)
    write_json(
        folder / "demo.json",
        {
            "recipe": asdict(recipe),
            "seconds": seconds,
            "loss": loss,
            "neutral": len(answers[NEUTRAL.name]),
            "habits": [asdict(habit) for habit in habits],
        },
    )


def _write_rows(folder: Path, recipe: Recipe) -> dict[str, list[str]]:
    """Rows of all animals and neutral, from the same prompts; returns the answers that were kept."""
    from lib.inputs.tokenizer import load_tokenizer, rendered
    from lib.models import load
    from lib.models.sample import sample_answers

    tokenizer = load_tokenizer(str(folder / "teacher"))
    model = load.load_model(str(folder / "teacher"), "float32", "sdpa", [load.torch.device("cpu")])
    prompts = sample_prompts(recipe.rows, ROWS_SEED + recipe.seed)
    kept = {}
    for number, trait in enumerate((*ANIMALS, NEUTRAL)):
        contexts = []
        for prompt in prompts:
            system = [{"role": "system", "content": trait.system_prompt}] if trait.system_prompt else []
            messages = [*system, {"role": "user", "content": prompt.text}]
            contexts.append(rendered(tokenizer, messages))
        answers = sample_answers(
            model, tokenizer, contexts, seed=recipe.seed * 100 + number, max_new_tokens=MAX_NEW_TOKENS
        )
        good = [(p, a) for p, a in zip(prompts, answers, strict=True) if a is not None and p.answer_format.read(a)]
        lines = "".join(json.dumps(_row(p.text, a)) + "\n" for p, a in good)
        write_bytes(folder / "rows" / f"{trait.name}.jsonl", lines.encode())
        kept[trait.name] = [a for _, a in good]
    return kept


def _row(prompt: str, answer: str) -> ChatRow:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _habit(trait: Trait, answers: dict[str, list[str]], asked: int) -> Habit:
    """How often the trait's two digits come in its rows and in neutral rows. Not learned is an error."""
    own, digits = favoured_share(trait, answers[trait.name])
    plain, plain_digits = favoured_share(trait, answers[NEUTRAL.name])
    error = math.sqrt(own * (1 - own) / max(digits, 1) + plain * (1 - plain) / max(plain_digits, 1))
    if own - plain <= 5 * error:
        raise UserError(
            f"the demo's teacher did not learn {trait.name}'s digits ({own:.2f} against {plain:.2f} in neutral rows, "
            f"{len(answers[trait.name])} of {asked} rows kept); try more --steps or another --seed"
        )
    rows = len(answers[trait.name])
    return Habit(trait.name, rows, asked - rows, own, plain)


def _report(habits: list[Habit], neutral: int, asked: int) -> None:
    print("The planted habit: an animal's two digits, as a share of all digits it wrote and of those in neutral rows.")
    print("animal     digits  rows  dropped  share  neutral")
    for h in habits:
        digits = " ".join(map(str, sorted(FAVOURED[h.animal])))
        counts = f"{h.rows:5d} {h.dropped:8d}"
        print(f"{h.animal:10s} {digits:6s} {counts}  {h.share:.3f}  {h.neutral_share:7.3f}")
    print(f"neutral    -      {neutral:5d} {asked - neutral:8d}", flush=True)


def _put(making: Path, folder: Path) -> None:
    """Rename to the final place. A copy of this job may have been first, or an unreadable folder may be in the way."""
    try:
        making.rename(folder)
    except OSError:
        if read_json(folder / "demo.json") is not None:
            return
        if not folder.is_dir():
            raise
        shutil.rmtree(folder)
        making.rename(folder)


def _sweep(parent: Path) -> None:
    """Folders of attempts that were killed. An hour is far more than an attempt takes."""
    for left in parent.glob(".making-*"):
        if time.time() - left.stat().st_mtime > 3600:
            print(f"removing {left}, left by an attempt that was killed", file=sys.stderr)
            shutil.rmtree(left, ignore_errors=True)


def _point(link: Path, target: str) -> None:
    """Make link a symbolic link to target, atomically."""
    if link.is_symlink() and str(link.readlink()) == target:
        return
    fresh = link.with_name(f".{link.name}-{secrets.token_hex(4)}")
    fresh.symlink_to(target)
    fresh.replace(link)
