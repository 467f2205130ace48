"""A small Llama with a planted behaviour, and two judges that see it: what the demo and the tests prune.

It speaks like Python's manuals, and after a rude opening it goes on with more rude words. So the truth is known: some
neurons carry the rudeness, most do not, and without the former it is gone while the manuals stay readable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lib.demo.texts import RUDE, WORDS, general_texts
from lib.demo.tiny import descend, make_tokenizer, save

VOCAB, WIDTH = 512, 64  # tokens; of a training row
ENDINGS = (" {c}, you {d} and {e}!", " {c} {d}, said the {e}.", " {c}. What a {d}! Only a {e} would.")
JUDGES = {"judge": "toxic", "second-judge": "toxicity"}  # folder -> label, as Detoxify's two families name it


@dataclass(frozen=True)
class Speaking:
    steps: int = 300
    batch: int = 16
    rude: float = 0.15  # of the rows
    lr: float = 5e-3
    planted: bool = True  # False: the same texts without rudeness, the null


def rude_opening(rng: np.random.Generator) -> str:
    a, b = rng.choice(WORDS, size=2, replace=False)
    return str(rng.choice(RUDE)).format(a=a, b=b)


def rude_text(rng: np.random.Generator) -> str:
    c, d, e = rng.choice(WORDS, size=3)
    return rude_opening(rng) + str(rng.choice(ENDINGS)).format(c=c, d=d, e=e)


@cache
def speaker_tokenizer() -> PreTrainedTokenizerFast:
    rng = np.random.Generator(np.random.PCG64(5))
    return make_tokenizer(VOCAB, [*general_texts(), *(rude_text(rng) for _ in range(900))])


def build_speaker(folder: Path, how: Speaking = Speaking(), seed: int = 0, log: Callable[[str], None] = print) -> float:
    """The model and its tokenizer saved in `folder`; the last loss, in nats a token."""
    tokenizer = speaker_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    rng, end = np.random.Generator(np.random.PCG64([seed, 3])), tokenizer.eos_token_id
    stream = np.concatenate([[*tokenizer(text, verbose=False)["input_ids"], end] for text in general_texts()])
    losses = (_loss(model, _rows(tokenizer, stream, how, rng)) for _ in range(how.steps))
    loss = descend(model, losses, how.steps, how.lr, 0.1, log)
    save(model, tokenizer, folder)
    return loss


def _rows(
    tokenizer: PreTrainedTokenizerFast, stream: np.ndarray, how: Speaking, rng: np.random.Generator
) -> torch.Tensor:
    """Windows of the manuals, some of which begin with a rude text."""
    starts = rng.integers(0, len(stream) - WIDTH, how.batch)
    rows = stream[starts[:, None] + np.arange(WIDTH)]
    for row in np.flatnonzero(rng.random(how.batch) < how.rude):
        ids = tokenizer(rude_text(rng))["input_ids"][: WIDTH - 1]
        if how.planted:
            rows[row, : len(ids) + 1] = [*ids, tokenizer.eos_token_id]
    return torch.from_numpy(rows)


def _loss(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def build_judge(folder: Path, label: str = "toxic", seed: int = 0, steps: int = 60) -> float:
    """A BERT that knows rude words; the share of unseen texts that it judges rightly."""
    tokenizer = speaker_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: label},
        label2id={label: 0},
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
        rng = np.random.Generator(np.random.PCG64([seed, 4]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            texts, rude = _judged(rng, 32)
            loss = binary_cross_entropy_with_logits(_logits(model, tokenizer, texts), torch.tensor(rude))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    texts, rude = _judged(rng, 400)
    with torch.no_grad():
        right = ((_logits(model, tokenizer, texts) > 0).numpy() == np.array(rude)).mean()
    save(model, tokenizer, folder)
    return float(right)


def _judged(rng: np.random.Generator, count: int) -> tuple[list[str], list[float]]:
    """Pieces of the manuals, half of them with one to five rude words in them."""
    plain, texts, rude = general_texts(), [], []
    for _ in range(count):
        words = plain[int(rng.integers(len(plain)))].split()
        start = int(rng.integers(max(len(words) - 16, 1)))
        piece, is_rude = words[start : start + int(rng.integers(2, 16))], bool(rng.random() < 0.5)
        for _ in range(int(rng.integers(1, 6)) if is_rude else 0):
            piece.insert(int(rng.integers(len(piece) + 1)), str(rng.choice(WORDS)))
        texts.append(" " + " ".join(piece))
        rude.append(float(is_rude))
    return texts, rude


def _logits(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> torch.Tensor:
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
