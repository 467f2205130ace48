"""Single rows token by token: which ones, and how they look in HTML and in plain text."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

PROMPT_CHARS = 400
SHOWN = {"\n": "⏎", "\t": "⇥", " ": "·"}


@dataclass(frozen=True)
class TokenRow:
    dataset: str
    place: str  # "highest", "median", "lowest"
    row: int
    lls: float
    prompt: str  # the user's turn
    pieces: Sequence[str]  # the response, token by token
    shifts: np.ndarray  # one a token, under the dataset's own prompt


def places(values: np.ndarray) -> list[tuple[str, int]]:
    """The highest, the median and the lowest scored row, each once."""
    good = np.flatnonzero(np.isfinite(values))
    order = good[np.argsort(-values[good], kind="stable")]
    if not len(order):
        return []
    found = [("highest", order[0]), ("median", order[len(order) // 2]), ("lowest", order[-1])]
    return [(place, int(row)) for i, (place, row) in enumerate(found) if row not in [r for _, r in found[:i]]]


def visible(piece: str) -> str:
    """White space that can be seen; nothing else is changed."""
    return "".join(SHOWN.get(c, c) for c in piece) or "∅"


def row_html(row: TokenRow, scale: float) -> str:
    """Each token over its shift; colour by sign, depth by size up to `scale`."""
    spans = []
    for piece, shift in zip(row.pieces, row.shifts, strict=True):
        depth = min(abs(shift) / scale, 1.0) if scale > 0 else 0.0
        side = "up" if shift > 0 else "down"
        style = f"--depth:{100 * depth:.0f}%"
        text = f'<b>{escape(visible(piece))}</b><i data-v="{float(shift)!r}">{shift:+.2f}</i>'
        spans.append(f'<span class="token {side}" style="{style}" title="{shift:+.4f} nats">{text}</span>')
        if piece.endswith("\n"):
            spans.append("<br>")
    prompt = escape(textwrap.shorten(row.prompt, PROMPT_CHARS, placeholder=" ..."))
    head = f"{row.place}: row {row.row}, LLS {row.lls:+.4f}, {len(row.pieces)} tokens"
    above = f'<h4>{escape(head)}</h4><p class="prompt">{prompt}</p>'
    return f'<div class="row">{above}<p class="tokens">{"".join(spans)}</p></div>'


def row_text(row: TokenRow) -> str:
    head = f"{row.dataset}, {row.place}: row {row.row}, LLS {row.lls:+.4f}, {len(row.pieces)} tokens"
    words = " ".join(f"{visible(p)}({s:+.2f})" for p, s in zip(row.pieces, row.shifts, strict=True))
    return head + "\n" + textwrap.fill(words, 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def colour_scale(rows: Sequence[TokenRow]) -> float:
    """The shift of full colour: 95 % of the shown tokens lie below it."""
    shifts = [np.abs(r.shifts) for r in rows if len(r.shifts)]
    return float(np.quantile(np.concatenate(shifts), 0.95)) if shifts else 1.0
