"""Tables that a page and plain text render alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Value = str | int | float | tuple[float, float] | None


@dataclass(frozen=True)
class Column:
    title: str
    form: str = ""  # format of a number; "" = words
    absent: str = "-"

    def text(self, value: Value) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return self.absent
        if isinstance(value, tuple):
            ends = [number(v, self.form) for v in value]
            return "-" if any(math.isnan(v) for v in value) else f"[{', '.join(ends)}]"
        return value if isinstance(value, str) else number(value, self.form)


def number(value: float, form: str) -> str:
    """What is not zero does not read as zero: it gets as many places as it takes."""
    text = f"{value:{form}}"
    if value == 0 or not math.isfinite(value) or any(digit in text for digit in "123456789"):
        return text
    sign = "+" if form.startswith("+") else ""
    return f"{100 * value:{sign}.1g}%" if form.endswith("%") else f"{value:{sign}.1g}"


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    marks: Mapping[tuple[int, int], str] = field(default_factory=dict)  # (row, column): written behind the number

    def cell(self, i: int, j: int) -> str:
        return self.columns[j].text(self.rows[i][j]) + self.marks.get((i, j), "")

    def text(self) -> str:
        pad = max((len(mark) for mark in self.marks.values()), default=0)
        cells = [[c.title + (" " * pad if c.form else "") for c in self.columns]]
        for i, row in enumerate(self.rows):
            gaps = [pad - len(self.marks.get((i, j), "")) if c.form else 0 for j, c in enumerate(self.columns)]
            cells.append([self.cell(i, j) + " " * gaps[j] for j in range(len(row))])
        widths = [max(len(line[j]) for line in cells) for j in range(len(self.columns))]
        left = [not c.form for c in self.columns]
        lines = [
            "  ".join(w.ljust(n) if to_left else w.rjust(n) for w, n, to_left in zip(line, widths, left, strict=True))
            for line in cells
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines), *([self.note] if self.note else [])])
