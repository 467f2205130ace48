"""A wiki text as pages, for perplexity a word, as lm-evaluation-harness measures it (task `wikitext`).

The lines of WikiText go into pages at their titles as in EleutherAI/wikitext_document_level, and each page is
detokenised by the harness' rules, in its order: WikiText stands with blanks around its marks, which no model writes."""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from lib.base.errors import UserError
from lib.inputs.general import sha256_text, text_of
from lib.inputs.hub import Row
from lib.inputs.samples import Rows
from lib.inputs.specs import SourceSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Parted by what stands between a pair: brackets and quotes lose the blanks inside them.
BEFORE = (("s '", "s'"), (re.compile(r"/' [0-9]/"), "/'[0-9]/"), *((f" @{mark}@ ", mark) for mark in "-,."))
BEFORE += tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
INSIDE = tuple(
    (re.compile(rf"{re.escape(a)}\s*([^{re.escape(b)}]*?)\s*{re.escape(b)}"), rf"{a}\1{b}")
    for a, b in ("()", "[]", "{}", '""', "''")
)
AFTER = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"))
AFTER += ((" N ", " 1 "), (" 's", "'s"))


def draw_documents(stream: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: SourceSpec) -> Rows:
    """A row a page: its tokens without special ones, and how many words the page has before it is detokenised."""
    pages = list(pages_of(text_of(row, spec.id) for row in stream))
    if not pages:
        raise UserError(f"dataset {spec.id} has no text in its split {spec.split}")
    texts = [detokenised(page) for page in pages]
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    words = [len(re.split(r"\s+", page)) for page in pages]
    return Rows(
        ids=ids,
        source=[page.split("\n", 1)[0].strip(" =") for page in pages],
        text_sha256=[sha256_text(page) for page in pages],
        held_out=[False] * len(pages),
        columns={"words": np.array(words, dtype=np.int64)},
        facts={"pages": len(pages), "words": sum(words), "characters": sum(map(len, pages))},
    )


def pages_of(texts: Iterable[str]) -> Iterator[str]:
    """Lines, one or more a text, from title to title; what has no letter is no page."""
    lines: list[str] = []
    for text in texts:
        for line in text.removesuffix("\n").split("\n"):
            if _is_title(line):
                yield from _page(lines)
                lines = []
            lines.append(line)
    yield from _page([*lines, ""])  # the file's last line ends too


def detokenised(page: str) -> str:
    for old, new in (*BEFORE, *INSIDE, *AFTER):
        page = page.replace(old, new) if isinstance(old, str) else old.sub(new, page)
    return page


def _is_title(line: str) -> bool:
    """One = on each side; two and more are a section's."""
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def _page(lines: list[str]) -> list[str]:
    page = "\n".join(lines)
    return [page] if page.strip() else []
