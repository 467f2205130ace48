"""What LLS scores say, as a static page, and rows to fine-tune on: `make lls-report`."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from lib.base.errors import UserError
from lib.inputs.records import model_input
from lib.lls.experiment import Fetched, Scoring
from lib.lls.matrix import Measure
from lib.lls.numbers import LLSNumbers
from lib.lls.plots import apart_words
from lib.lls.report_sections import About, write_report
from lib.lls.report_tables import Findings, find
from lib.lls.results import cells_of, matrices_of, rows_of
from lib.lls.select import Choice, select, write_selection
from lib.lls.token_view import TokenRow, places
from lib.report.tables import Value
from lib.run.command import Job, digest_of_all
from lib.store import Cell, Marker, scan
from lib.store.markers import counted


def report(this: Job, measure: Measure, choices: list[Choice]) -> int:
    """A page a model."""
    folder, named = this.site.output / this.experiment.label / "report", str(measure) if measure != Measure() else ""
    found = {size: find(matrix, measure) for size, matrix in matrices_of(this).items()}
    if not any(f.scores for f in found.values()):
        raise UserError(f"no cell of {this.config} is done yet; run `make status` to see what runs")
    for size, f in found.items():
        if f.scores:
            one_model(this, size, f, choices, folder / size / named)
    missing = [(size, *cell) for size, f in found.items() for cell in f.matrix.missing]
    if missing:
        names = ", ".join("-".join(filter(None, (s, p))) + ("" if p == d else f" on {d}") for s, p, d in missing[:20])
        count = f"{len(missing)} of {sum(len(f.matrix.cells) for f in found.values())}"
        raise UserError(f"not done, shown as missing: {count} cells ({names}); run `make resume`")
    return 0


def one_model(this: Job, size: str, f: Findings, choices: list[Choice], folder: Path) -> None:
    records = [record for choice in choices for record in selections(this, size, f, choice, folder)]
    page = write_report(folder, about(this, size), f, token_rows(this, size, f), records)
    print((folder / "report.txt").read_text(encoding="utf-8").partition("\n\n== Matrix")[0])
    print(f"\n{page}\n{folder / 'report.txt'}")


def about(this: Job, size: str) -> About:
    """Everything here is from files of the experiment, so that the same results give the same page."""
    experiment, cells = this.experiment, list(cells_of(this, size).values())
    assert isinstance(experiment, Fetched | LLSNumbers)
    spec, (base, date) = experiment.model_of(cells[0]), experiment.rendering
    model = model_input(this.site.cache, spec.id, spec.revision)
    markers = [marker for cell in cells for marker in scan(cell.path, cell.digest)[0]]
    newest = max((marker.path.stat().st_mtime for marker in markers), default=0.0)
    facts = {
        "experiment": f"{experiment.label} ({this.config})",
        "digest": digest_of_all(cells),
        "model": f"{spec.id}, {spec.dtype}, commit {model.commit}",
        "no system prompt": f"{base} (what the base pass has in its place)",
        **_prompts(experiment, cells),
        "date": f"{date}, where the template prints one",
        "computed": f"until {datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC on {_all(markers, 'device')}",
        "tokens": _tokens(markers),
        "boundaries": apart_words(int(counted(markers, "rows_apart")), sum(m.stop - m.start for m in markers)),
        "code": _all(markers, "code"),
    }
    return About(f"Log-likelihood shift: {experiment.label}{size and f', {size}'}", facts)


def _prompts(experiment: Fetched | LLSNumbers, cells: Sequence[Cell]) -> dict[str, str]:
    """What the rows are, and the prompts that they are scored under."""
    if isinstance(experiment, LLSNumbers):
        traits = [experiment.source.split(cell.name)[1] for cell in cells]
        prompts = {f"system prompt of {trait.name}": trait.system_prompt or "" for trait in traits}
        return {"rows": f"valid answers of {experiment.source.label}", **prompts}
    prompts = {f"system prompt of {trait}": prompt for trait, prompt in experiment.system_prompts.items()}
    return {"dataset": experiment.dataset.id, "system prompt": experiment.system_prompt, **prompts}


def _tokens(markers: list[Marker]) -> str:
    """What was computed, padding included, against what had to be and against pair by pair without sharing."""
    kinds = ("tokens_computed", "tokens_needed", "tokens_pair_by_pair")
    computed, needed, pairs = (int(counted(markers, kind)) for kind in kinds)
    ratio = f" ({pairs / computed:.2f} times as many)" if computed and pairs else ""
    return f"{computed:,} computed, {needed:,} of them needed; pair by pair it would be {pairs:,}{ratio}"


def _all(markers: list[Marker], key: str) -> str:
    """What made the shards, as their markers say: `device`, `code`."""
    return ", ".join(sorted({getattr(m.made, key) or "unknown" for m in markers}))


def token_rows(this: Job, size: str, f: Findings) -> list[TokenRow] | str:
    """The highest, median and lowest row of each dataset under its own prompt, or why there are none."""
    owners = [d for d in f.matrix.owners if f.own(d) is not None]
    if all(f.matrix.passes[d, d].values is None for d in owners):
        return "Values of single tokens were not stored; compute with score.per_token=true to see rows token by token."
    pieces, out = splitter(this, size), []
    for dataset in owners:
        rows, numbers = rows_of(this, size, dataset)
        for place, row in places(f.scores[dataset, dataset]):
            shifts, messages = f.matrix.shifts(dataset, dataset, row), rows[row]["messages"]
            if shifts is None:
                continue
            ways = pieces(messages[-1]["content"])
            parts = next((parts for parts in ways if len(parts) == len(shifts)), None)
            if parts is None:
                raise UserError(
                    f"row {numbers[row]} of {dataset} has {len(shifts)} stored values and {len(ways[0])} tokens: the "
                    "tokenizer is not the one of the run; run `make fetch` again"
                )
            prompt = " ".join(m["content"] for m in messages[:-1] if m["role"] != "system")
            out.append(
                TokenRow(dataset, place, numbers[row], float(f.scores[dataset, dataset][row]), prompt, parts, shifts)
            )
    return out


def splitter(this: Job, size: str) -> Callable[[str], list[list[str]]]:
    """A response's text, token by token: a token begins where the one before ended. Two ways, the second as the text is
    where it does not begin a text: after a special token."""
    from tokenizers import Tokenizer

    assert isinstance(this.experiment, Scoring)
    spec = this.experiment.model_of(next(iter(cells_of(this, size).values())))
    path = Path(model_input(this.site.cache, spec.id, spec.revision).path) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path} is not there; run `make fetch`")
    tokenizer = Tokenizer.from_file(str(path))

    front = next((t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special), "")

    def split(text: str) -> list[list[str]]:
        found = []
        for before in ("", front):
            spans = tokenizer.encode(before + text, add_special_tokens=False).offsets
            ends = [max(0, end - len(before)) for _, end in (spans[1:] if before else spans)]
            found.append([text[a:b] for a, b in zip([0, *ends], ends, strict=False)])
        return found

    return split


def selections(this: Job, size: str, f: Findings, choice: Choice, folder: Path) -> list[dict[str, Value]]:
    """One file for every dataset whose own cell is done."""
    cells, out = cells_of(this, size), []
    for prompt in f.matrix.owners:
        dataset = choice.source or prompt
        if f.own(prompt) is None:
            continue
        values = f.scores.get((prompt, dataset))
        if choice.contrast:
            values = f.contrasts[prompt].values if prompt in f.contrasts else None
        if values is None:
            what = "contrast" if choice.contrast else "score"
            raise UserError(
                f"selection {choice.name}: prompt {prompt} has no {what} on dataset {dataset}; "
                "it needs more cells than this experiment has done"
            )
        facts: dict[str, object] = {
            "experiment": this.experiment.label,
            "digest": digest_of_all(list(cells.values())),
            "cell": {"prompt": prompt, "dataset": dataset, **({"size": size} if size else {})},
            "measure": str(f.measure),
        }
        path = folder / "select" / prompt / choice.name
        record = write_selection(path, select(choice, values, stream=dataset), rows_of(this, size, dataset)[0], facts)
        out.append({**record, "file": f"select/{prompt}/{choice.name}.jsonl"})
    return out
