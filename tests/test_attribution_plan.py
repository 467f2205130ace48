"""What attribution will cost, by the plan and by hand; and what its cells' digests depend on."""

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from attribution_jobs import ROWS, TOKENS, Place, small_place
from conftest import ROOT
from tools import write_rows

from lib.cluster.plan import plan
from lib.inputs.fetch import fetch
from lib.run.experiment import TFLOPS


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return small_place(tmp_path_factory.mktemp("plan"))


def body() -> int:
    """Parameters that every token passes: q, k, v, o, the MLP and two norms a layer, and the last norm."""
    return 3 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 80 + 2 * 48) + 48


def test_the_plan_counts_samples_bytes_and_arithmetic(place, tmp_path):
    here, experiment = place.at(tmp_path), place.experiment()
    width = -(-max(map(len, here.samples("toxic").ids)) // 8) * 8
    plans = plan(experiment, experiment.cells(here.cache, here.scratch), here.cache, "h200")
    # tokens, target, logit; a count for each of 3 layers; 2 scores of 240 neurons; 3 x 48 sums of squares
    row = 4 * (3 + 3 + 2 * 240 + 3 * 48)
    assert [(p.rows, p.bytes) for p in plans] == [(7, 7 * row)] * 3 + [(6, 6 * row)]
    for p, tokens in zip(plans, (TOKENS, TOKENS, TOKENS, width), strict=True):
        flops = 2 * tokens * (2 * body() + 3 * 80 * 48) * p.rows
        assert p.seconds == pytest.approx(flops / (TFLOPS["h200"] * 1e12 * experiment.share)) and p.gpu_hours == 0
    some = [place.experiment(f"run.gpus={n}") for n in (1, 2)]
    one, two = (plan(e, e.cells(here.cache, here.scratch), here.cache, "h200")[0] for e in some)
    assert one.seconds == plans[0].seconds == pytest.approx(two.seconds * 1.8)  # 0.9 of twice one's rate
    assert one.gpu_hours == one.seconds / 3600 and two.gpu_hours == two.seconds / 1800
    few = place.experiment("score.scores=[]")
    alone = plan(few, few.cells(here.cache, here.scratch), here.cache, "h200")[0]
    assert alone.seconds / plans[0].seconds == pytest.approx(body() / (2 * body() + 3 * 80 * 48))
    assert alone.bytes == 7 * 4 * (1 + 3 + 3 * 48)


def test_the_plan_of_weights_counts_blocks(place, tmp_path):
    """A last block of one sample costs one sample; a block is a shard."""
    experiment = place.experiment("score.level=weight", "score.block=3", "score.store=bfloat16", "score.wanda=false")
    plans = plan(experiment, experiment.cells(place.cache, tmp_path), place.cache, "h200")
    # samples and tokens (8 bytes), 3 counts, 3 targets and logits; 2 scores of 3 layers in 2 bytes
    assert [p.bytes for p in plans] == [n * (4 + 8 + 12 + 12 + 12 + 2 * 3 * 80 * 48 * 2) for n in (3, 3, 3, 2)]
    assert [p.shards for p in plans] == [[(0, 1), (1, 2), (2, 3)]] * 3 + [[(0, 1), (1, 2)]]
    flops = 2 * TOKENS * (2 * body() + 3 * 80 * 48) * 7
    assert plans[0].seconds == pytest.approx(flops / (TFLOPS["h200"] * 1e12 * experiment.share))
    wide = ("score.level=weight", "score.batch_tokens=4096")  # no batch is larger than a block
    assert place.experiment(*wide, "score.block=3").batch(place.cache, "general-0") == (3, TOKENS)
    assert place.experiment(*wide).batch(place.cache, "general-0") == (7, TOKENS)


def test_dry_shows_the_batch_file_and_the_plan(place, tmp_path):
    here = place.at(tmp_path)
    ask = ("cluster", "submit", "--config", str(here.config), "--dry")
    said = here.here(*ask, SUITE_SITE="fasrc", FASRC_LAB="my_lab", SUITE_SLURM="yes")
    assert said.code == 0, said.err
    assert (ROOT / "slurm/compute_attributions.sbatch").read_text().strip() in said.out
    command = next(line for line in said.out.splitlines() if line.startswith("# would run: "))
    assert command.split()[3:7] == ["sbatch", "--parsable", "--array=0-3%16", "--job-name=exp"], command
    assert "--time=20" in command  # 15 minutes, and twice what the estimate says, in fives
    lines = [line.split() for line in said.out.splitlines()]
    assert ["cell", "name", "rows", "to", "do", "shards", "bytes", "GPU-hours"] in lines
    for index, name in enumerate(ROWS):  # 2,520 bytes a row (above); batches of 2 samples
        shown = next(line for line in lines if line[:2] == [str(index), name])
        assert shown[2:7] == [
            str(ROWS[name]),
            str(ROWS[name]),
            "4" if index < 3 else shown[4],
            f"{2.52 * ROWS[name]:.3g}",
            "kB",
        ]
    assert (
        "# would start 2 workers here: bash slurm/compute_attributions.sbatch" in here.here(*ask, SUITE_SLURM="no").out
    )
    assert not list(tmp_path.iterdir())


def digests(place: Place, *overrides: str) -> dict[str, str]:
    return {c.name: c.digest for c in place.experiment(*overrides).cells(place.cache, place.scratch)}


def test_settings_that_change_results_change_digests_and_no_others(place):
    before = digests(place)
    for override in (
        *("rule=gradient", "level=weight", "scores=[abs]", "layers=[down_proj]", "target=all", "wanda=false"),
        *("batch_tokens=24", "block=5", "store=bfloat16"),
    ):
        now = digests(place, f"score.{override}")
        assert not set(now.values()) & set(before.values()), override
    assert len({digests(place, "score.target=given", f"score.tokens=[{t}]")["toxic"] for t in (4, 5)}) == 2
    assert digests(place, "model.dtype=bfloat16")["toxic"] != before["toxic"]
    few = digests(place, "max_samples=6")
    assert [name for name in ROWS if few[name] != before[name]] == ["general-0", "general-1", "general-2"]
    assert digests(place, "run.shard_rows=1", "run.gpus=2", "score.nonfinite=9") == before


def edited(place: Place, config: Path, old: str, new: str) -> Place:
    """The experiment with another text in its place, fetched."""
    text = place.config.read_text()
    assert text.count(old) == 1
    config.write_text(text.replace(old, new))
    here = replace(place, config=config, scratch=config.parent / "scratch")
    fetch(here.experiment(), here.cache)
    return here


def test_another_behaviour_leaves_what_is_there(place, tmp_path):
    """Also where every position is explained, and the new one's prompts are longer than all that was there."""
    rows = [{"text": "numbers " * (90 + i), "toxicity": 1.0} for i in range(4)]
    write_rows(tmp_path / "curt/prompts.jsonl", rows)
    curt = f"\n  prompts: {{curt: {{id: {tmp_path}/curt, samples: 4}}, "
    more = edited(place, tmp_path / "more.yaml", "\n  prompts: {", curt)
    before, now = digests(place), digests(more)
    assert list(now) == ["general-0", "general-1", "general-2", "curt", "toxic"]
    assert {name: now[name] for name in before} == before and len(set(now.values())) == 5
    every = edited(place, tmp_path / "every.yaml", "score: {", "score: {target: all, ")
    assert every.compute(3, "run.shard_rows=1").code == 0  # as many columns of targets as were needed then
    last = max(every.cell("toxic").path.glob("*-00000006.json"))
    shutil.move(last, tmp_path)
    more = edited(every, tmp_path / "more.yaml", "\n  prompts: {", curt)
    assert more.compute(4).code == 0
    with h5py.File(more.merge("toxic")) as f:
        assert f["target"].shape[1] > max(len(ids) for ids in place.samples("toxic").ids) + 8


def test_other_samples_are_another_cell(place, tmp_path):
    fewer = edited(place, tmp_path / "fewer.yaml", "samples: 11", "samples: 10")
    before, now = digests(place), digests(fewer)
    assert [name for name in ROWS if now[name] != before[name]] == ["toxic"]
    again = edited(place, tmp_path / "again.yaml", "held_out: true", "held_out: true, threshold: 0.89")
    assert [name for name in ROWS if digests(again)[name] != before[name]] == ["toxic"]
