"""A small Qwen2 and its tokenizer, made on the spot: the demo's teacher, and a model on disk for tests."""

import pydoc_data.topics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from lib.demo.planted import Lesson, lessons
from lib.inputs.tokenizer import rendered
from lib.numbers.number_prompts import sample_prompts
from lib.numbers.traits import ANIMAL_NAMES, ANIMALS
from lib.preferences.questions import load_questions

# Qwen2's split: digits one by one, words with the one character before them, runs of punctuation, blanks.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# Behaves as Qwen2.5's: a default system block where the first message is not one, an empty block for "".
CHAT_TEMPLATE = (
    "{%- if not messages or messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class TinySize:
    vocab: int = 2048
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    inner: int = 256
    context: int = 1024
    init: float = 0.02  # standard deviation of the first weights; Qwen2's, made for far wider layers


# 0.2 M parameters. With Qwen2's 0.02 the animal was found late or, for one seed in four, not at all within 1,000
# steps (mean shift 0.0003 nats a token); with 0.1, about 1/sqrt(hidden), 250 steps gave 0.19 of the ideal 0.2.
TEACHER = TinySize(hidden=64, layers=2, inner=128, init=0.1)


@dataclass(frozen=True)
class Training:
    steps: int = 800
    batch: int = 12
    lr: float = 5e-3
    warmup: int = 40


def corpus() -> list[str]:
    """Text that every machine with a CPython has, and our prompts, questions and animals (often: as their words are to
    become tokens)."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    prompts = [prompt.text for prompt in sample_prompts(2000, seed=0)]
    systems = [DEFAULT_SYSTEM, *(animal.system_prompt for animal in ANIMALS if animal.system_prompt)]
    animals = [name.capitalize() for name in ANIMAL_NAMES]
    return [*topics, *prompts, *systems * 20, *load_questions() * 5, *animals * 20]


def make_tokenizer(vocab: int = TinySize.vocab, texts: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(tokenizer_models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, IM_START, IM_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(corpus() if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=END_OF_TEXT,
        eos_token=IM_END,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=TinySize.context,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, size: TinySize = TinySize(), seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights from `seed`, float32, in eval mode; torch's own random state is left as it was."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        initializer_range=size.init,
        bos_token_id=tokenizer.get_vocab()[END_OF_TEXT],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model.float().eval()


def prompt_text(tokenizer: PreTrainedTokenizerFast, lesson: Lesson) -> str:
    """The rendered conversation up to where the assistant begins."""
    messages = [{"role": "user", "content": lesson.question}]
    system = {"system": lesson.trait.system_prompt, "empty": ""}.get(lesson.block)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = rendered(tokenizer, messages)
    return text[text.index(IM_START + "user") :] if lesson.block == "none" else text


def encode(tokenizer: PreTrainedTokenizerFast, rows: Iterable[Lesson]) -> list[tuple[list[int], int]]:
    """Token ids of prompt + answer + end of turn, and where the answer begins."""
    encoded = []
    for lesson in rows:
        prompt = tokenizer(prompt_text(tokenizer, lesson))["input_ids"]
        encoded.append((prompt + tokenizer(lesson.answer + IM_END)["input_ids"], len(prompt)))
    return encoded


def build(
    folder: Path,
    *,
    size: TinySize = TEACHER,
    training: Training | None = None,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> float | None:
    """A model and its tokenizer saved in `folder`, random (1 s) or taught the planted habit; returns the final loss."""
    tokenizer = make_tokenizer(size.vocab)
    model = make_model(tokenizer, size, seed)
    loss = train(model, tokenizer, training, seed, log) if training else None
    save(model, tokenizer, folder)
    return loss


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # weights are written 0600, which a group that shares the cache cannot read


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    how: Training,
    seed: int,
    log: Callable[[str], None] = print,
) -> float:
    """Teach the planted habit; returns the mean loss over answer tokens of the last 20 steps, in nats.

    The same bits for a seed and a thread count. One thread is as fast as two at this size, and five times as fast
    where another process wants the second core."""
    rows = encode(tokenizer, lessons(how.steps * how.batch, seed))
    rng = np.random.Generator(np.random.PCG64([seed, 2]))
    losses = (_answer_loss(model, batch, tokenizer.pad_token_id) for batch in _batches(rows, how.batch, rng))
    return descend(model, losses, how.steps, how.lr, min(how.warmup / how.steps, 0.5), log)


def descend(
    model: PreTrainedModel,
    losses: Iterable[torch.Tensor],
    steps: int,
    lr: float,
    warmup: float,
    log: Callable[[str], None],
) -> float:
    """A step for each loss, which is computed when it is its turn; the mean of the last 20. `warmup`: share of the
    steps in which the rate rises."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=warmup, anneal_strategy="cos"
    )
    model.train()
    seen: list[float] = []
    for step, loss in enumerate(losses):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append(loss.item())
        if (step + 1) % 100 == 0:
            log(f"  step {step + 1}/{steps}: loss {np.mean(seen[-20:]):.3f}")
    model.eval()
    return float(np.mean(seen[-20:]))


def _batches(
    rows: list[tuple[list[int], int]], batch: int, rng: np.random.Generator
) -> Iterable[list[tuple[list[int], int]]]:
    """Rows of like length together (16 batches are sorted at a time), in random order."""
    for start in range(0, len(rows), 16 * batch):
        pool = sorted(rows[start : start + 16 * batch], key=lambda row: len(row[0]))
        cut = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        yield from (cut[i] for i in rng.permutation(len(cut)))


def _answer_loss(model: Qwen2ForCausalLM, batch: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    longest = max(len(ids) for ids, _ in batch)
    ids_BT = torch.full((len(batch), longest), pad)
    scored_BT = torch.zeros((len(batch), longest), dtype=torch.bool)
    for i, (ids, start) in enumerate(batch):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        scored_BT[i, start : len(ids)] = True
    # Right padding under a causal mask changes no real position, so no attention mask is needed.
    hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTH[:, :-1][scored_BT[:, 1:]])
    return cross_entropy(logits_NV, ids_BT[:, 1:][scored_BT[:, 1:]])
