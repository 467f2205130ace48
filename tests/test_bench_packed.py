"""The bench's rung of packed rows measures what it says: transformers' own values, whatever rows lie beside a row."""

import torch
from transformers import AttentionInterface, Qwen2ForCausalLM

from lib.bench import packed
from lib.bench.shapes import Shape, qwen_config, rows

SHAPE = Shape(2, 64, 96, 4, 2, 16, 500, 1e-6, True, True)


def test_rows_laid_end_to_end_have_the_values_of_rows_alone() -> None:
    AttentionInterface.register("packed", packed.over_borders)
    torch.manual_seed(0)
    hf = Qwen2ForCausalLM._from_config(qwen_config(SHAPE), attn_implementation="packed", dtype=torch.float32).eval()
    for weights in hf.parameters():
        torch.nn.init.normal_(weights, 0, 0.2)
    items = rows(SHAPE, 20)
    batches = list(packed.filled(items, 700))
    assert [item for batch in batches for item in batch] == items and len(batches) > 3
    assert all(sum(len(packed.whole(item)) for item in batch) <= 700 for batch in batches)
    with torch.inference_mode():
        found = torch.cat([packed.scores(hf, batch) for batch in batches])
        hf.set_attn_implementation("sdpa")
        wanted = packed.plain(hf, items)
    assert len(found) == sum(len(item.response) for item in items) and wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
