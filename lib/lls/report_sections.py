"""LLS results as a static page, its pictures, and the same tables as text. The same results give the same bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.base.atomic import write_bytes
from lib.lls import report_bars, report_plots, report_tables
from lib.lls.analysis import finite
from lib.lls.report_tables import Findings
from lib.lls.token_view import TokenRow, colour_scale, row_html, row_text
from lib.report import stats
from lib.report.heat import Heat, heat_map
from lib.report.page import Picture, Section, page, picture_html
from lib.report.tables import Table, Value

CROSS = "Separation and contrast compare prompts on the same rows; they need a matrix of prompts by datasets."
ALONE = "Here each dataset is scored under its own prompt alone; kind lls_cross scores datasets under every prompt."


@dataclass(frozen=True)
class About:
    title: str
    facts: Mapping[str, str]  # digest, configuration, model, date of the data, ...


def write_report(
    folder: Path,
    about: About,
    f: Findings,
    tokens: Sequence[TokenRow] | str,
    selections: Sequence[Mapping[str, Value]] = (),
) -> Path:
    """index.html, report.txt and the PNGs in `folder`. `tokens` is the rows to show, or why there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    between = [Section("matrix", "Between prompts", f"{CROSS} {ALONE}")]
    if not f.matrix.diagonal:
        between = [_matrix(f, folder), _separation(f, folder), _contrast(f, folder)]
    sections = [
        _own(f, folder),
        *between,
        _quintiles(f, folder),
        *_noise(f, folder),
        _tokens(tokens, f),
        *([_selections(selections)] if selections else []),
        _missing(f),
    ]
    subtitle = f"Measure: {f.measure} ({f.measure.caption})."
    html = page(about.title, subtitle, _tiles(f), about.facts, sections)
    write_bytes(folder / "index.html", html.encode())
    write_bytes(folder / "report.txt", (_plain(about, subtitle, f, sections, tokens) + "\n").encode())
    return folder / "index.html"


def _tiles(f: Findings) -> list[tuple[str, str]]:
    """What the page says first."""
    m = f.matrix
    done, cells = len(f.scores), len(m.cells)
    scored = sum(len(finite(v)) for v in f.scores.values())
    without = sum(len(v) for v in f.scores.values()) - scored
    tiles = [(f"{done} of {cells}", f"cells done; {scored:,} scores, {without:,} rows without one")]
    above = [own.mean() > 0 for name in m.owners if (own := f.own(name)) is not None]
    if above:
        tiles.append((f"{sum(above)} of {len(above)}", "datasets likelier under their own prompt than without it"))
    best = [f.means[:, m.datasets.index(d)] for d in m.owners if np.isfinite(f.means[:, m.datasets.index(d)]).sum() > 1]
    if best:
        first = stats.maxima(f.means)[1]
        own = [first[m.datasets.index(d)] == m.prompts.index(d) for d in m.owners if f.own(d) is not None]
        tiles.append((f"{sum(own)} of {len(own)}", "datasets whose own prompt is the highest of their column"))
    for what, found in (
        ("other animals' rows", [s.others for s in f.separations if s.others]),
        ("neutral rows", [s.neutral for s in f.separations if s.neutral]),
    ):
        if found:
            values = [e.value for e in found]
            words = f"median AUC of own against {what} ({min(values):.3f} to {max(values):.3f})"
            tiles.append((f"{np.median(values):.3f}", words))
    return tiles


def _own(f: Findings, folder: Path) -> Section:
    report_plots.histograms(f, folder / "histograms.png")
    slides = []
    for name in f.matrix.owners:
        if f.own(name) is not None:
            report_plots.overlay(f, name, folder / f"histogram_{name}.png")
            slides.append(Picture(f"histogram_{name}.png", f"Distribution of LLS of the {name} rows"))
    lead = "How much each dataset's rows gain from the prompt they were written under, row by row."
    alt = "Distributions of LLS, one panel a dataset, with neutral and other rows where they are scored"
    more = [("Every dataset as a slide", "".join(picture_html(p) for p in slides))] if slides else []
    return Section("own", "Own prompt", lead, [Picture("histograms.png", alt)], [report_tables.own_table(f)], more)


def _matrix(f: Findings, folder: Path) -> Section:
    m = f.matrix
    order = [*m.owners, *(p for p in m.prompts if p not in m.owners)]
    index = [m.prompts.index(p) for p in order]
    form = "+.3f" if np.nanmax(np.abs(f.means), initial=0) < 10 else "+.1f"
    plain = m.neutral if m.owners else None
    scaled = len(m.owners) or None
    pictures = [Picture("heat_mean.png", "Mean LLS, prompt by dataset")]
    heat_map(
        Heat("Mean LLS, prompt by dataset", "Mean over rows.", f.measure.axis, order, m.datasets, f.means[index], form,
             plain=plain, scaled=scaled),
        folder / "heat_mean.png",
    )  # fmt: skip
    if np.isfinite(f.normalised).any():
        pictures.append(Picture("heat_columns.png", "Mean LLS in standard deviations of its column"))
        heat_map(
            Heat("Mean LLS within its column", "In standard deviations over the animals' prompts.", "deviations",
                 order, m.datasets, f.normalised[index], "+.1f", centre=0, plain=plain, scaled=scaled),
            folder / "heat_columns.png",
        )  # fmt: skip
    lead = "Every prompt on every dataset. Most of a mean is the kind of prompt; the columns tell whose rows they are."
    return Section("matrix", "Matrix", lead, pictures, report_tables.matrix_tables(f))


def _separation(f: Findings, folder: Path) -> Section:
    if not any(s.others or s.neutral for s in f.separations):
        return Section("separation", "Separation", CROSS)
    report_bars.auc_bars(f, folder / "auc.png")
    m = f.matrix
    heat_map(
        Heat("AUC of own rows against each dataset", "0.5 is chance.", "AUC", m.owners, m.datasets, f.pairs, ".2f",
             centre=0.5, own=True, marks=False),
        folder / "heat_auc.png",
    )  # fmt: skip
    lead = "Can the score alone tell a prompt's own rows from other rows, all scored under that prompt?"
    pictures = [
        Picture("auc.png", "AUC of own rows against other animals' rows and against neutral rows, with intervals"),
        Picture("heat_auc.png", "AUC of each prompt's own rows against each dataset"),
    ]
    tables = [report_tables.separation_table(f), report_tables.pairs_table(f)]
    return Section("separation", "Separation", lead, pictures, tables)


def _contrast(f: Findings, folder: Path) -> Section:
    if not f.contrasts:
        return Section("contrast", "Contrast", CROSS)
    report_bars.contrast_bars(f, folder / "contrast.png")
    lead = "What a row gains from its own prompt beyond what any animal's prompt gives it."
    pictures = [Picture("contrast.png", "Mean contrastive score of each dataset with its interval")]
    return Section("contrast", "Contrast", lead, pictures, [report_tables.contrast_table(f)])


def _quintiles(f: Findings, folder: Path) -> Section:
    report_bars.quintile_dots(f, folder / "quintiles.png")
    lead = "The rows of each dataset by score, in fifths: what a selection of the top or bottom fifth would hold."
    table = report_tables.quintile_table(f)
    return Section("quintiles", "Quintiles", lead, [Picture("quintiles.png", "Mean LLS of each quintile")], [table])


def _noise(f: Findings, folder: Path) -> list[Section]:
    if not f.noise:
        return []
    report_bars.noise_dots(f, folder / "noise.png")
    lead = "How far a row's score moves when it is computed in higher precision, against how far rows differ."
    return [Section("noise", "Noise", lead, [Picture("noise.png", "Noise of the precision against the spread of LLS")])]


def _tokens(tokens: Sequence[TokenRow] | str, f: Findings) -> Section:
    if isinstance(tokens, str):
        return Section("tokens", "Tokens", tokens)
    scale = colour_scale(tokens)
    lead = (
        "Log-likelihood shift of each response token under the dataset's own prompt, in nats. Red: likelier with the "
        f"prompt, blue: less likely; full colour from {scale:.2f}. Of each dataset the "
        f"highest, median and lowest row by measure {f.measure}; every token of the response is shown."
    )
    names = list(dict.fromkeys(r.dataset for r in tokens))
    more = [(name, "".join(row_html(r, scale) for r in tokens if r.dataset == name)) for name in names]
    return Section("tokens", "Tokens", lead, more=more)


def _selections(records: Sequence[Mapping[str, Value]]) -> Section:
    lead = "Files of rows under select/, each a JSONL of messages, with the provenance beside it."
    return Section("selections", "Selections", lead, tables=[report_tables.selection_table(records)])


def _missing(f: Findings) -> Section:
    absent: dict[str, list[str]] = {}
    for prompt, dataset in f.matrix.missing:
        absent.setdefault(prompt, []).append(dataset)
    if not absent:
        return Section("missing", "Missing", "Nothing: every cell of the experiment is done.")
    rows = [[p, len(ds), ", ".join(ds)] for p, ds in absent.items()]
    columns = [report_tables.Column("prompt"), report_tables.Column("cells", "d"), report_tables.Column("datasets")]
    lead = f"{len(f.matrix.missing)} of {len(f.matrix.cells)} cells: shown as missing above, and in no mean."
    return Section("missing", "Missing", lead, tables=[Table("missing", "Cells without a result", columns, rows)])


def _plain(
    about: About, subtitle: str, f: Findings, sections: Sequence[Section], tokens: Sequence[TokenRow] | str
) -> str:
    width = max(map(len, about.facts), default=0)
    parts = [about.title, subtitle, "\n".join(f"{k:{width}s}  {v}" for k, v in about.facts.items())]
    parts.append("\n".join(f"{n:>12s}  {what}" for n, what in _tiles(f)))
    for s in sections:
        parts += [f"== {s.title}\n{s.lead}", *(t.text() for t in s.tables)]
        if s.name == "tokens" and not isinstance(tokens, str):
            parts += [row_text(r) for r in tokens]
    return "\n\n".join(parts)
