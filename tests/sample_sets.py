"""What tests of sample sets need: a small Llama whose tokenizer adds a BOS, a small toxicity scorer, an experiment."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.inputs.samples import Samples, SamplesInput, read_samples, samples_input
from lib.inputs.specs import DatasetSpec, ModelSpec, TokenSets
from lib.run.experiment import Experiment

TOKENS, SAMPLES, BUFFER, ASKED = 300, 12, 50, 60  # of general sets, and prompts
BOS = "<|endoftext|>"
LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")


class Sets(Experiment):
    """Just a model and its sets."""

    model: ModelSpec
    data: TokenSets

    def models(self) -> list[ModelSpec]:
        return [self.model]

    def datasets(self) -> list[DatasetSpec]:
        return []

    def token_sets(self) -> TokenSets:
        return self.data


def sets(model: Path | str, **data: Any) -> Sets:
    return Sets.model_validate(
        {"kind": "sets", "name": "sets", "model": {"id": str(model), "dtype": "float32"}, "data": data}
    )


@dataclass(frozen=True)
class Place:
    """Texts and a model, and room for caches to fetch into."""

    folder: Path
    model: Path

    def sets(self, prompts: dict | None = None, text: dict | None = None, **general) -> Sets:
        source = {"id": str(self.folder / "texts/c4"), "config": "en", "seeds": [0, 1, 2], "buffer": BUFFER}
        toxic = {"id": str(self.folder / "texts/prompts"), "samples": ASKED, **(prompts or {})}
        wiki = {"id": str(self.folder / "texts/wikitext"), "config": "wikitext-2-raw-v1", **(text or {})}
        general = {**source, "samples": SAMPLES, "tokens": TOKENS, **general}
        return sets(self.model, general=general, prompts={"toxic": toxic}, text=wiki)

    def documents(self) -> dict[str, str]:
        """All texts of the training split, by their url, read by hand."""
        shards = list((self.folder / "texts/c4/en").glob("*train*"))
        assert len(shards) == 4
        return {row["url"]: row["text"] for path in shards for row in shard_rows(path)}

    def prompts(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "texts/prompts/prompts.jsonl").open()]

    def ids(self, text: str) -> list[int]:
        """By the tokenizer's file alone."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.model / "tokenizer.json")).encode(text).ids


def shard_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def made(experiment: Sets, cache: Path, name: str) -> tuple[SamplesInput, Samples]:
    digest = experiment.data.digest(cache, experiment.model, name)
    record = samples_input(cache, name, digest, experiment.data.sets()[name][0].id)
    return record, read_samples(cache, record)


def bos_model(folder: Path) -> Path:
    """tiny_llama with a BOS that its tokenizer puts first, as Llama-3's does."""
    from tokenizers.processors import TemplateProcessing
    from tools import tiny_llama
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama(folder))
    id = tokenizer.convert_tokens_to_ids(BOS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, id)])
    tokenizer.bos_token, tokenizer.pad_token = BOS, None
    tokenizer.save_pretrained(folder)
    return folder


def scorer(folder: Path, words: list[str]) -> Path:
    """A random BERT with detoxify's labels, sharp enough that texts get different scores."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True)
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789,.;:!?'-()"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet, *(f"##{c}" for c in alphabet), *words]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=64)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
        model.classifier.weight.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
