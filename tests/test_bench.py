"""What the bench measures beside our own: transformers on packed rows; models too large for the disk."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, Qwen2ForCausalLM

from lib.bench import packed
from lib.bench.shapes import Shape, qwen_config, rows
from lib.bench.whole import save_random
from lib.checkpoint.headers import folder_bytes, folder_tensors

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


def test_a_hollow_model_has_the_tensors_of_a_random_one_and_takes_no_room(tmp_path: Path) -> None:
    wide = Shape(2, 256, 512, 4, 2, 64, 5000, 1e-6, True, False)
    for name, hollow in (("random", False), ("hollow", True)):
        (tmp_path / name).mkdir()
        save_random(wide, qwen_config(wide), tmp_path / name, hollow)
    found = {name: folder_tensors(tmp_path / name) for name in ("random", "hollow")}
    assert {n: t.shape for n, t in found["random"].items()} == {n: t.shape for n, t in found["hollow"].items()}
    assert folder_bytes(tmp_path / "random") == folder_bytes(tmp_path / "hollow") > 5_000_000
    files = list((tmp_path / "hollow").glob("*.safetensors"))
    assert sum(file.stat().st_blocks for file in files) * 512 < 50_000
    assert all(not values.any() for file in files for values in load_file(file).values())
    assert load_file(tmp_path / "random" / "model-00001.safetensors")["model.layers.1.mlp.up_proj.weight"].std() > 0.01
