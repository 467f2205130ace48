"""Make the sets of an experiment, or keep those that are there and whole."""

import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from lib.base.atomic import sha256_file, write_json
from lib.base.errors import UserError
from lib.base.typed import Mistyped, parse
from lib.config.frozen import digest_of
from lib.inputs.general import draw_general, draw_text
from lib.inputs.kept import kept_or_made
from lib.inputs.pages import draw_documents
from lib.inputs.prompts import Answerer, Prompt, answered, draw_prompts, usable
from lib.inputs.records import model_files, model_input, model_sizes, read_record
from lib.inputs.samples import Rows, SamplesInput, check_samples, samples_folder, samples_input, save_samples
from lib.inputs.source import Source, find_source
from lib.inputs.specs import DocumentsSpec, GeneralSpec, ModelSpec, PromptsSpec, SourceSpec, TokenSets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("datasets", "tokenizers", "transformers")
NOT_THE_TOKENIZER = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Candidates:
    """Prompts that wait for their answers."""

    made_from: list[str]
    counts: dict[str, int]
    prompts: list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """One set to make or keep."""

    cache: Path
    model: ModelSpec
    name: str
    spec: SourceSpec
    seed: int | None
    identity: dict[str, object]
    source: Source

    @property
    def digest(self) -> str:
        return digest_of(self.identity)

    @property
    def scorer(self) -> str | None:
        """Fingerprint of the classifier, where a set is chosen by one."""
        spec = self.spec
        if not _by_response(spec):
            return None
        return model_input(self.cache, spec.scorer.id, spec.scorer.revision).fingerprint


def prepare(
    data: TokenSets,
    model: ModelSpec,
    cache: Path,
    update: bool = False,
    by_hand: str = "",
    answerer: Answerer | None = None,
) -> None:
    """All sets, those that need a GPU last: there `answerer` lets the model answer; `by_hand`: what to type instead."""
    asked: set[tuple[str, str]] = set()
    for name, (spec, seed) in sorted(data.sets().items(), key=lambda item: _by_response(item[1][0])):
        again = update and (spec.id, spec.revision) not in asked  # all sets of a source get one commit
        asked.add((spec.id, spec.revision))
        identity = data.identity(cache, model, name)
        task = Task(cache, model, name, spec, seed, identity, find_source(cache, spec, again))
        found = kept_or_made(
            samples_folder(cache, name, task.digest),
            f"samples {name}",
            lambda task=task: _kept(task),
            lambda task=task: _make(task, answerer, by_hand),
        )
        size = f"{found.rows} rows, {found.attributed} to attribute with {found.tokens} tokens"
        print(f"samples {name}: {found.commit[:12]}, {size}, sha256 {found.sha256[:12]}", flush=True)


def command_by_hand(env: Mapping[str, str], gpus: int) -> str:
    """What to type to run with these arguments on a node with a GPU, on the site's partition and account."""
    keys = ("partition", "account", "constraint")
    where = [f"--{key}={env[name]}" for key in keys if env.get(name := f"SBATCH_{key.upper()}")]
    arguments = shlex.join(word for word in sys.argv[1:] if word != "--update")
    size = f"--gpus={max(gpus, 1)} --mem=64G --time=60"
    return " ".join(["srun", *where, size, ".venv/bin/python -m jobs.prepare_data", arguments])


def _by_response(spec: SourceSpec) -> TypeGuard[PromptsSpec]:
    return isinstance(spec, PromptsSpec) and spec.select == "response"


def _kept(task: Task) -> SamplesInput | None:
    """A set that is whole and was made from what its source and its scorer are now."""
    with suppress(UserError):
        found = samples_input(task.cache, task.name, task.digest, task.spec.id)
        now = (task.source.commit, task.source.stamp, task.scorer)
        if (found.commit, found.source_stamp, found.facts.get("scorer")) == now:
            check_samples(task.cache, found)
            return found
    return None


def _make(task: Task, answerer: Answerer | None, by_hand: str) -> SamplesInput:
    from lib.inputs.tokenizer import load_tokenizer  # torch and transformers: only when there is something to make

    folder, spec, seed = model_input(task.cache, task.model.id, task.model.revision).path, task.spec, task.seed or 0
    tokenizer = load_tokenizer(folder)
    if isinstance(spec, GeneralSpec):
        _must_fit(spec, Path(folder))
        rows = draw_general(task.source.rows((seed, spec.buffer)), tokenizer, spec, seed, task.name)
    elif isinstance(spec, PromptsSpec):
        rows = _prompts(task, spec, tokenizer, answerer, by_hand)
    elif isinstance(spec, DocumentsSpec):
        rows = draw_documents(task.source.rows(), tokenizer, spec)
    else:
        rows = draw_text(task.source.rows(), tokenizer, spec)
    rows.facts |= {"revision": spec.revision, "packages": {package: version(package) for package in PACKAGES}}
    rows.facts |= {"scorer": task.scorer} if task.scorer else {}
    about: dict[str, object] = {"commit": task.source.commit, "identity": task.identity}
    about["tokenizer"] = tokenizer_fingerprint(Path(folder))
    return save_samples(
        task.cache,
        task.name,
        task.digest,
        rows,
        source=spec.id,
        commit=task.source.commit,
        source_stamp=task.source.stamp,
        attributes=about,
    )


def _must_fit(spec: GeneralSpec, folder: Path) -> None:
    most = model_sizes(folder).max_position_embeddings
    if most and spec.tokens > most:
        raise UserError(f"data.general.tokens is {spec.tokens}, and the model has {most} positions; lower it")


def _prompts(
    task: Task, spec: PromptsSpec, tokenizer: "PreTrainedTokenizerBase", answerer: Answerer | None, by_hand: str
) -> Rows:
    counts: Counter[str] = Counter()
    if spec.select != "response":
        return draw_prompts(usable(task.source.rows(), tokenizer, spec, counts), spec, task.name, counts)
    candidates = _candidates(task, spec, tokenizer, counts)
    if answerer is None:
        raise ValueError("nobody answers prompts here")
    answer = answerer(task.cache, task.model, spec, task.name, by_hand)
    return draw_prompts(answered(candidates, spec, counts, answer), spec, task.name, counts)


def _candidates(
    task: Task, spec: PromptsSpec, tokenizer: "PreTrainedTokenizerBase", counts: Counter[str]
) -> list[Prompt]:
    """The first candidates, kept beside the set: they are read where there is a network and answered where there is a
    GPU, which on a cluster are two machines."""
    path = samples_folder(task.cache, task.name, task.digest) / "candidates.json"
    made_from = [task.source.commit, task.source.stamp]
    known = read_record(Candidates, path)
    with suppress(Mistyped):
        if known and known.made_from == made_from:
            prompts = [_prompt(one) for one in known.prompts]
            counts.update(known.counts)
            return prompts
    found: Counter[str] = Counter()
    prompts = list(islice(usable(task.source.rows(), tokenizer, spec, found), spec.candidates))
    write_json(path, asdict(Candidates(made_from, dict(found), [asdict(prompt) for prompt in prompts])))
    counts.update(found)
    return prompts


def _prompt(raw: dict[str, object]) -> Prompt:
    """NaN stands in the file where a dataset gives no score, and is no number that a record may hold."""
    return parse(Prompt, {key: value for key, value in raw.items() if value == value})


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over the tokenizer's own files: the models of a family share it."""
    files = [p for p in model_files(folder) if p.suffix != ".safetensors" and p.name not in NOT_THE_TOKENIZER]
    return digest_of({p.name: sha256_file(p) for p in files})
