"""The bench's rungs of a sweep run, on shapes of a CPU; what they claim of bits is so."""

import pytest

from lib.bench import llamas, sweep


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(llamas.LLAMAS, "nano", (2, 64, 128, 2, 1, 500))
    monkeypatch.setattr(sweep, "DEVICE", "cpu")
    monkeypatch.setattr(sweep, "timed", lambda run, repeats: (run(), 1e-3)[1])
    monkeypatch.setattr(sweep.torch.cuda, "max_memory_allocated", lambda: 0)
    for name, value in (("WINDOW", 64), ("WINDOWS", 4), ("PROMPTS", 2), ("SAMPLES", 2), ("NEW", 4), ("NEURONS", 20)):
        monkeypatch.setattr(sweep, name, value)
    return "nano"


def test_perplexity_and_completions_are_measured(nano):
    found = sweep.perplexity(nano, 256)
    assert found["tokens_per_s"] > 0 and found["transformers_tokens_per_s"] > 0
    found = sweep.completions(nano, 256)
    assert found["pruned_logits_differ"] and found["undone_logits_equal"] and found["completions_per_s"] > 0
