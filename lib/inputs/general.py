"""General text: documents of a shuffled stream, cut to one length; and a whole split as one row."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from lib.base.errors import UserError
from lib.base.progress import Progress
from lib.base.typed import as_text, is_text
from lib.inputs.hub import Row
from lib.inputs.samples import Rows
from lib.inputs.specs import GeneralSpec, SourceSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 32  # documents tokenised at once, by as many threads as the tokenizer takes


def draw_general(
    stream: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: GeneralSpec, seed: int, name: str
) -> Rows:
    """The first documents that are long enough. Where a random crop begins depends on the set's seed and the document's
    place in the stream alone, whichever other documents are taken."""
    rows, places, offsets, lengths, seen = Rows(), [], [], [], 0
    with closing(Progress(spec.samples, unit=f"{name} samples")) as progress:
        for row, text, ids in _documents(stream, tokenizer, spec.id):
            place, seen = seen, seen + 1
            if len(ids) < spec.tokens:
                continue
            offset = _offset(seed, place, len(ids) - spec.tokens) if spec.crop == "random" else 0
            rows.ids.append(ids[offset : offset + spec.tokens])
            rows.source.append(_called(row))
            rows.text_sha256.append(sha256_text(text))
            places.append(place)
            offsets.append(offset)
            lengths.append(len(ids))
            progress.add(1)
            if len(rows.ids) == spec.samples:
                break
    if len(rows.ids) < spec.samples:
        raise UserError(
            f"samples {name}: {spec.id} has only {len(rows.ids)} documents of {spec.tokens} tokens or more "
            f"(of {seen}), and {spec.samples} are asked for; lower data.general.samples or data.general.tokens"
        )
    rows.held_out = [False] * spec.samples
    rows.columns = {
        "document": np.array(places, dtype=np.int64),  # place in the shuffled stream
        "offset": np.array(offsets, dtype=np.int32),  # token of the document at which the row begins
        "document_tokens": np.array(lengths, dtype=np.int32),
    }
    rows.facts = {"documents": seen, "too_short": seen - spec.samples}
    return rows


def draw_text(stream: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: SourceSpec) -> Rows:
    """All rows joined by an empty line and tokenised at once: Wanda's convention for perplexity."""
    texts = [text_of(row, spec.id) for row in stream]
    if not texts:
        raise UserError(f"dataset {spec.id} has no rows in its split {spec.split}")
    whole = "\n\n".join(texts)
    return Rows(
        ids=encode(tokenizer, [whole]),
        source=["/".join(part for part in (spec.config, spec.split) if part)],
        text_sha256=[sha256_text(whole)],
        held_out=[False],
        facts={"documents": len(texts), "characters": len(whole)},
    )


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids with the special tokens that the tokenizer itself adds. Where a text is written with its BOS, that is
    the same token again, and one of the two goes."""
    bos = tokenizer.bos_token_id
    rows = tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    for ids in rows:
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
    return rows


def text_of(row: Row, id: str) -> str:
    text = row.get("text")
    if not is_text(text):
        raise UserError(f"dataset {id}: its rows have no `text`; they have {', '.join(row)[:120]}")
    return text


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _offset(seed: int, place: int, most: int) -> int:
    """From 0 to `most`, all equally likely."""
    return int(np.random.Generator(np.random.PCG64([seed, place])).integers(0, most + 1))


def _documents(
    stream: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", id: str
) -> Iterator[tuple[Row, str, list[int]]]:
    stream = iter(stream)
    while batch := list(islice(stream, BATCH)):
        texts = [text_of(row, id) for row in batch]
        yield from zip(batch, texts, encode(tokenizer, texts), strict=True)


def _called(row: Row) -> str:
    """What the dataset itself calls the document, where it does."""
    return next((as_text(row[key]) for key in ("url", "filename", "id") if row.get(key) is not None), "")
