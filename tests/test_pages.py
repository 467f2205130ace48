"""A wiki text as pages: against the harness' own code, and against the file read as a whole."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
from sample_sets import Place, bos_model, made, sets
from tools import write_rows

from lib.attribution.experiment import Attribution
from lib.base.errors import UserError
from lib.demo.texts import write_demo_texts
from lib.inputs.fetch import fetch
from lib.inputs.pages import detokenised, pages_of

LINES = [
    *(" ", " = Robert Boulter = ", " "),
    """ Robert 's friends ( " the boys " ) paid £ 2 @,@ 000 @.@ 5 ; a well @-@ known act ! """,
    *(" ", " = = Career = = ", " ", " = = = In 2000 [ sic ] = = = ", " ", " = 5 is no title "),
    """ It 's 20 ° C , N times : ' so ' . """,
    " He said { x } ? ",
    *(" ", " ", " = Du Fu = ", " ", """ The poets ' lives , " A """, """ and B " . """),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    write_demo_texts(folder / "texts")
    return Place(folder, bos_model(folder / "model"))


def rows_of(lines: list[str]) -> list[str]:
    """As Salesforce/wikitext has a file: a row a line, what is blank without its blank."""
    return [line + "\n" if line.strip() else "" for line in lines]


def pages_by_hand(lines: list[str]) -> list[str]:
    """The file, blanks and last line end and all, from title to title."""
    lines = ("\n".join(lines) + "\n").split("\n")
    starts = [i for i, line in enumerate(lines) if re.fullmatch(r" = [^=].*[^=] = ", line)]
    return ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


@pytest.mark.parametrize("end", [[], [" "], [" ", " "]])
def test_pages_of_rows_are_the_files_pages(end):
    wanted, found = pages_by_hand(LINES + end), list(pages_of(rows_of(LINES + end)))
    assert [page.split("\n")[0] for page in found] == [" = Robert Boulter = ", " = Du Fu = "]
    for mine, theirs in zip(found, wanted, strict=True):
        assert detokenised(mine) == wikitext_detokenizer({"page": theirs})
        assert len(re.split(r"\s+", mine)) == process_results({"page": theirs}, [0.0])["word_perplexity"][1]
    assert list(pages_of(["", "\n", " \n"])) == []
    assert list(pages_of(["no title\n", " = One = \nand its text\n"])) == ["no title", " = One = \nand its text\n"]


def test_detokenising_is_the_harness():
    parts = [*re.findall(r" ?\S+ ?|\n", "\n".join(LINES)), "s '", " @-@ ", "= = = =", " ( ", " ) ", " '", "/' 5/"]
    rng, changed = np.random.default_rng(0), 0
    for _ in range(300):
        page = "".join(rng.choice(parts, size=rng.integers(1, 60)))
        assert detokenised(page) == wikitext_detokenizer({"page": page})
        changed += detokenised(page) != page
    assert changed > 200


def test_the_set_holds_pages_without_special_tokens_and_their_words(place, tmp_path):
    text = {"id": str(place.folder / "texts/wikitext"), "config": "wikitext-2-raw-v1"}
    plain = place.sets(seeds=[0], samples=1)
    more = sets(place.model, **(plain.data.model_dump() | {"documents": {}}))
    spec = more.data.documents
    assert spec and (spec.id, spec.config, spec.split) == (text["id"], text["config"], "test")
    fetch(more, tmp_path)
    lines = (place.folder / "texts/wikitext/wikitext-2-raw-v1/test.jsonl").read_text().splitlines()
    pages = list(pages_of(json.loads(line)["text"] for line in lines))
    record, found = made(more, tmp_path, "documents")
    assert len(pages) > 3 and record.rows == record.attributed == len(pages)
    bos = place.ids("")
    for page, ids, words in zip(pages, found.every, found.columns["words"], strict=True):
        assert bos + ids.tolist() == place.ids(wikitext_detokenizer({"page": page}))
        assert words == len(re.split(r"\s+", page))
    assert found.columns["words"].dtype == np.int64 and record.facts["words"] == found.columns["words"].sum()
    assert found.columns["source"][0] == pages[0].split("\n")[0].strip(" =")


def test_it_changes_no_other_set_and_is_no_cell(place, tmp_path):
    plain = place.sets(seeds=[0, 1])
    more = sets(place.model, **(plain.data.model_dump() | {"documents": {"split": "validation"}}))
    fetch(plain, tmp_path)
    assert list(more.data.sets()) == [*plain.data.sets(), "documents"]
    for name in plain.data.sets():
        assert more.data.digest(tmp_path, more.model, name) == plain.data.digest(tmp_path, plain.model, name)
    same = sets(place.model, **(plain.data.model_dump() | {"documents": {}}))
    digests = {same.data.digest(tmp_path, same.model, name) for name in ("text", "documents")}
    assert len(digests) == 2 and more.data.digest(tmp_path, more.model, "documents") not in digests
    assert "documents" not in plain.science()["data"] and "documents" in more.science()["data"]
    whole = more.model_dump() | {"kind": "attribution", "name": "a"}
    assert Attribution.model_validate(whole).names() == ["general-0", "general-1", "toxic"]
    with pytest.raises(ValueError, match="'documents' is the name of another set"):
        sets(place.model, general={"id": "x"}, prompts={"documents": {"id": "y"}})
    with pytest.raises(ValueError, match="id"):
        sets(place.model, general={"id": "x"}, prompts={"a": {"id": "y"}}, documents={})


def test_a_source_without_text_is_said(place, tmp_path):
    file = str(write_rows(tmp_path / "own.jsonl", [{"text": ""}, {"text": " \n"}]))
    data = place.sets(seeds=[0], samples=1).data.model_dump() | {"documents": {"id": file, "config": None}}
    with pytest.raises(UserError, match=r"dataset .*own\.jsonl has no text in its split test"):
        fetch(sets(place.model, **data), tmp_path)
    assert Path(file).exists()
