"""A static page: style inline, pictures as files beside it, nothing loaded from elsewhere, every text escaped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lib.report.tables import Table, Value

STYLE = """
:root { color-scheme: light dark; --ground:#fbfbfa; --card:#fff; --ink:#1d2126; --soft:#5b636c; --line:#e2e4e7;
  --accent:#1d4e89; --up:#d1495b; --down:#1982c4; }
@media (prefers-color-scheme: dark) { :root { --ground:#14171a; --card:#1c2024; --ink:#e8eaed; --soft:#a2abb4;
  --line:#32383e; --accent:#8ab8ee; --up:#e0697a; --down:#4aa3df; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.2rem; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: .9rem; margin: 0; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.soft, .note, footer { color: var(--soft); }
.note { font-size: .86rem; }
nav { position: sticky; top: 0; z-index: 2; background: var(--ground); border-bottom: 1px solid var(--line); }
nav div { max-width: 76rem; margin: 0 auto; padding: .55rem 1.25rem; display: flex; gap: 1.1rem; overflow-x: auto;
  white-space: nowrap; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .86rem; display: block; line-height: 1.35; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.2rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .6rem; padding: .5rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th.word, td.word { text-align: left; }
tbody tr:last-child td { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; }
tbody td:first-child, thead th:first-child { position: sticky; left: 0; background: var(--card); }
td.absent { color: var(--soft); font-style: italic; }
td.best { font-weight: 700; } td sup { color: var(--accent); padding-left: .1rem; line-height: 0; }
details { margin: .25rem 0; } summary { cursor: pointer; color: var(--accent); padding: .2rem 0; }
.row { border: 1px solid var(--line); border-radius: .6rem; background: var(--card); padding: .7rem; margin: .6rem 0; }
.prompt { color: var(--soft); font-size: .86rem; margin: .2rem 0 .5rem; }
.tokens { max-width: none; margin: 0; line-height: 1.2; }
.token { display: inline-block; text-align: center; border-radius: .25rem; padding: .12rem .22rem; margin: 0 1px 3px 0;
  font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .84rem; }
.token b { font-weight: 500; white-space: pre; } .token i { display: block; font-style: normal; font-size: .62rem; }
.up { background: color-mix(in srgb, var(--up) calc(var(--depth) * .55), transparent); }
.down { background: color-mix(in srgb, var(--down) calc(var(--depth) * .55), transparent); }
footer { margin: 3rem auto; font-size: .86rem; border-top: 1px solid var(--line); padding-top: 1rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } h1 { font-size: 1.5rem; }
  th, td { padding: .3rem .5rem; } figure { overflow-x: auto; } figure img { padding: .2rem; min-width: 46rem; } }
@media print { nav { display: none; } body { background: #fff; color: #000; font-size: 10pt; }
  .scroll { overflow: visible; border: 0; } table { font-size: 6.5pt; } th, td { padding: .1rem .25rem; }
  figure, tr, .row, .tile { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


@dataclass(frozen=True)
class Picture:
    file: str  # beside the page
    alt: str


@dataclass(frozen=True)
class Section:
    name: str  # anchor
    title: str
    lead: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    more: Sequence[tuple[str, str]] = ()  # folded: (summary, HTML)


def page(
    title: str, subtitle: str, tiles: Sequence[tuple[str, str]], facts: Mapping[str, str], sections: Sequence[Section]
) -> str:
    links = "".join(f'<a href="#{escape(s.name)}">{escape(s.title)}</a>' for s in sections)
    shown = "".join(f'<div class="tile"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what in tiles)
    about = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    body = "\n".join(_section(s) for s in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">{escape(subtitle)}</p>
<div class="tiles">{shown}</div>
<dl>{about}</dl>
</header>
<nav><div>{links}</div></nav>
<main>
{body}
</main>
<footer>The same tables as plain text: <a href="report.txt">report.txt</a>. The pictures lie beside this page.</footer>
</body>
</html>
"""


def _section(s: Section) -> str:
    parts = [f'<section id="{escape(s.name)}"><h2>{escape(s.title)}</h2>', f"<p>{escape(s.lead)}</p>"]
    parts += [picture_html(p) for p in s.pictures]
    parts += [table_html(t) for t in s.tables]
    parts += [f"<details><summary>{escape(summary)}</summary>{html}</details>" for summary, html in s.more]
    return "\n".join([*parts, "</section>"])


def picture_html(p: Picture) -> str:
    image = f'<img src="{escape(p.file)}" alt="{escape(p.alt)}" width="2100" height="1200">'
    return f'<figure><a href="{escape(p.file)}">{image}</a></figure>'


def table_html(table: Table) -> str:
    heads = "".join(f'<th scope="col"{_word(c.form)}>{escape(c.title)}</th>' for c in table.columns)
    lines = ["".join(_cell(table, i, j, value) for j, value in enumerate(row)) for i, row in enumerate(table.rows)]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table id="table-{escape(table.name)}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _cell(table: Table, i: int, j: int, value: Value) -> str:
    """A number's full value is kept in data-v."""
    text, mark = table.columns[j].text(value), table.marks.get((i, j), "")
    if isinstance(value, int | float) and not math.isnan(value):
        return f'<td{" class=best" if mark else ""} data-v="{value!r}">{escape(text)}{_mark(mark)}</td>'
    if isinstance(value, tuple) and not math.isnan(value[0]):
        return f'<td data-v="{value[0]!r} {value[1]!r}">{escape(text)}</td>'
    if isinstance(value, str):
        return f"<td{_word(table.columns[j].form)}>{escape(text)}</td>"
    return f'<td class="absent">{escape(text)}</td>'


def _mark(mark: str) -> str:
    return f"<sup>{escape(mark)}</sup>" if mark else ""


def _word(form: str) -> str:
    return "" if form else ' class="word"'
