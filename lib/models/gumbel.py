"""Sampling whose randomness is a function of (seed, prompt, number, step, token) and of nothing else.

argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T). Here the noise is a hash of those five numbers:
two models that answer the same prompts under one seed meet the same noise (common random numbers, so what differs
between them is theirs), and an answer depends on no other of its batch. Prompt, number and step go through a 64-bit
hash on the host, once for all steps; each token through a 32-bit one on the device, in plain integer operations."""

import numpy as np
import torch
from transformers import LogitsProcessor

GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64 - 1


class Gumbel(LogitsProcessor):
    """For generate with do_sample=False. `numbers`: (prompt, number) of each row; the first step follows `width`."""

    def __init__(
        self,
        seed: int,
        numbers: list[tuple[int, int]],
        width: int,
        steps: int,
        temperature: float,
        device: torch.device,
    ) -> None:
        self.width, self.temperature = width, temperature
        self.keys_SB2 = torch.from_numpy(stream_keys(seed, numbers, steps)).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_BV = gumbel(self.keys_SB2[input_ids.shape[1] - self.width], scores.shape[1])
        return noise_BV.add_(scores, alpha=1 / self.temperature)


def stream_keys(seed: int, numbers: list[tuple[int, int]], steps: int) -> np.ndarray:
    """int32 [steps, rows, 2]: splitmix64's finalizer over seed, prompt, number and step, one after another."""
    prompt_B, number_B = np.array(numbers, np.uint64).T
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed & WORD], np.uint64) + np.uint64(GOLDEN))
        for part in (prompt_B, number_B, np.arange(steps, dtype=np.uint64)[:, None]):
            key = _mix((key ^ part) + np.uint64(GOLDEN))
    return np.ascontiguousarray(key).view(np.int32).reshape(steps, len(numbers), 2)


def gumbel(key_B2: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """float32 noise [rows, vocabulary]: -log(-log(1 - v)), v uniform in (0, 1) with 32 bits, which float32 has near 0,
    where the noise is large."""
    x_BV = torch.arange(vocabulary, dtype=torch.int32, device=key_B2.device)[None] + key_B2[:, :1]
    _fold(x_BV, 17).mul_(_signed(0xED5AD4BB))  # triple32's shifts and constants, half of the key in the middle
    _fold(x_BV, 11).add_(key_B2[:, 1:]).mul_(_signed(0xAC4C1B51))
    _fold(x_BV, 15).mul_(0x31848BAB)
    v_BV = _fold(x_BV, 14).to(torch.float32).add_(0.5).mul_(2.0**-32)  # from -1/2 to 1/2
    v_BV.add_(v_BV < 0).clamp_(max=1 - 2.0**-24)  # a negative one stands for the upper half
    return v_BV.neg_().log1p_().neg_().log_().neg_()


def _fold(x: torch.Tensor, by: int) -> torch.Tensor:
    """x ^= x >> by, as of an unsigned number."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (32 - by)) - 1))


def _signed(constant: int) -> int:
    return constant - 2**32 if constant >= 2**31 else constant


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
