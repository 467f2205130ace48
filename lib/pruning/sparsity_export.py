"""Perplexity with a share of all weights zero: a table, a picture, and what others measured beside it.

<output root>/<experiment>/sparsity.csv, sparsity.json, sparsity.txt, sparsity.png"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from lib.base.atomic import write_bytes, write_json
from lib.base.errors import UserError
from lib.pruning.export import as_csv
from lib.pruning.looks import DENSE
from lib.pruning.sparsity import Sparsity
from lib.report.look import INK, STYLE, drawn, grid_lines, new_figure, save, titles
from lib.report.tables import Column, Table, Value
from lib.run.command import Job, digest_of_all
from lib.store import read_done

COLOURS = {"magnitude": "#343a40", "wanda": "#1982c4", "sequential": "#1d4e89", "lrp": "#9d0208"}
Found = dict[tuple[str, str], dict[str, float]]  # (cell, pattern) -> share of zeros, perplexities


def export(this: Job) -> int:
    experiment, cells = this.of(Sparsity), this.cells()
    folder, found = this.site.output / experiment.label, measured(this)
    table, beside = seeds_table(experiment, found), expected_table(experiment, found)
    write_bytes(folder / "sparsity.csv", as_csv([[c.title for c in table.columns], *table.rows]))
    provenance = {"digest": digest_of_all(cells), "experiment": experiment.model_dump(mode="json")}
    rows = [{"cell": cell, "pattern": pattern, **values} for (cell, pattern), values in found.items()]
    write_json(folder / "sparsity.json", {"rows": rows, "provenance": provenance})
    words = f"{table.text()}\n\n{beside.text()}"
    write_bytes(folder / "sparsity.txt", (words + "\n").encode())
    plot(experiment, found, folder / "sparsity.png")
    print(f"{words}\n{folder / 'sparsity.txt'}\n{folder / 'sparsity.png'}")
    wanted = [(name, pattern) for name in experiment.names() for pattern in experiment.patterns_of(name)]
    if missing := [f"{name} {pattern}".strip() for name, pattern in wanted if (name, pattern) not in found]:
        raise UserError(f"{len(missing)} of {len(wanted)} are not done ({', '.join(missing[:12])}); run `make resume`")
    return 0


def measured(this: Job) -> Found:
    experiment = this.of(Sparsity)
    schema, found = experiment.schema(this.site.cache), Found()
    for cell in this.cells():
        for row, values in read_done(cell, schema):
            pattern = experiment.patterns_of(cell.name)[row]
            share = float(values["zeros"][0] / values["weights"][0])
            looks = {name: float(values[f"perplexity/{name}"][0]) for name in experiment.evaluate.labels}
            looks |= {task: float(values[f"task/{task}"][0][0]) for task in experiment.evaluate.tasks}
            found[cell.name, pattern] = {"zeros": share, **looks}
    return found


def of(experiment: Sparsity, found: Found, method: str, pattern: str, what: str) -> list[float]:
    """Of every seed that is there."""
    names = [DENSE] if method == DENSE else [n for n, way in experiment.ways.items() if way.method == method]
    return [found[name, pattern][what] for name in names if (name, pattern) in found]


def seeds_table(experiment: Sparsity, found: Found) -> Table:
    """Mean over seeds and their standard deviation."""
    looks = [*experiment.evaluate.labels, *experiment.evaluate.tasks]
    columns = [Column("method"), Column("pattern"), Column("seeds", "d"), Column("zeros", ".2%")]
    columns += [column for look in looks for column in (Column(look, ".3f"), Column("sd", ".3f"))]
    rows: list[list[Value]] = []
    for method in (DENSE, *experiment.methods):
        for pattern in experiment.patterns if method != DENSE else [""]:
            zeros = of(experiment, found, method, pattern, "zeros")
            row: list[Value] = [method, pattern, len(zeros), float(np.mean(zeros)) if zeros else None]
            for look in looks:
                values = of(experiment, found, method, pattern, look)
                row += [
                    float(np.mean(values)) if values else None,
                    float(np.std(values, ddof=1)) if len(values) > 1 else None,
                ]
            rows.append(row)
    return Table("sparsity", f"Without a share of the weights of {', '.join(experiment.layers)} layers", columns, rows)


def expected_table(experiment: Sparsity, found: Found) -> Table:
    columns = [Column("measure"), Column("method"), Column("pattern"), Column("expected", ".4g"), Column("ours", ".4g")]
    columns += [Column("off by", "+.1%"), Column("within", ".0%"), Column(""), Column("source")]
    rows: list[list[Value]] = []
    for one in experiment.expected:
        values = of(experiment, found, one.method or DENSE, one.pattern or "", one.measure)
        ours = float(np.mean(values)) if values else None
        off, word = one.beside(ours)
        rows.append(
            [one.measure, one.method or DENSE, one.pattern or "", one.value, ours, off, one.within, word, one.source]
        )
    return Table("expected", "Expected, by others", columns, rows)


def _above(ax: Axes, words: str, x: float, y: float) -> None:
    ax.annotate(words, (x, y), (0, 4), textcoords="offset points", ha="center")


@drawn
def plot(experiment: Sparsity, found: Found, path: Path) -> None:
    look = experiment.evaluate.labels[0] if experiment.evaluate.labels else "zeros"
    with mpl.rc_context(STYLE):
        figure = new_figure(rows=3)
        ax = figure.subplots()
        width = 0.8 / len(experiment.methods)
        for number, method in enumerate(experiment.methods):
            for place, pattern in enumerate(experiment.patterns):
                values, x = of(experiment, found, method, pattern, look), place + (number + 0.5) * width - 0.4
                if values:
                    ax.bar(x, np.mean(values), width * 0.9, color=COLOURS[method])
                    ax.plot([x] * len(values), values, "o", color=INK, markersize=4)
                    ax.annotate(
                        f"{np.mean(values):.4g}", (x, max(values)), (0, 4), textcoords="offset points", ha="center"
                    )
                else:
                    ax.annotate("missing", (x, 1), (0, 4), textcoords="offset points", ha="center", rotation=90)
        dense: Sequence[float] = of(experiment, found, DENSE, "", look)
        if dense:
            ax.axhline(dense[0], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        ax.set_yscale("log")
        ax.set_ylabel(f"Perplexity, {look}")
        ax.set_xticks(range(len(experiment.patterns)), experiment.patterns)
        handles = [mpl.patches.Patch(color=COLOURS[method], label=method) for method in experiment.methods]
        ax.legend(handles=handles, frameon=False, loc="upper left", ncols=len(handles))
        grid_lines(ax)
        ax.set_ylim(None, 2 * ax.get_ylim()[1])
        titles(ax, "Perplexity without a share of the weights", "Bars: mean over seeds, dots: each. Dashed: dense")
        save(figure, path)
