"""Wanda's scores from sums of squares of a layer's inputs: |W_ji| times the norm of input i.

Suffixes: J outputs, I inputs."""

from typing import Literal

import torch

Norm = Literal["tokens", "sample_mean", "rms"]
CHUNK_VALUES = 1 << 24  # of a weight, made absolute at once: 64 MB of float32


def norms(sumsq_I: torch.Tensor, tokens: int, samples: int, kind: Norm) -> torch.Tensor:
    """Input norms from sums of squares over all tokens of all samples.

    tokens       of all tokens laid end to end: grows with their number
    sample_mean  root of the mean over samples of a sample's squared norm, as Wanda's own code has it
    rms          per token: the only one that can be compared between sets of other lengths"""
    over = {"tokens": 1, "sample_mean": samples, "rms": tokens}[kind]
    return (sumsq_I / over).sqrt()


def weight_scores(weight_JI: torch.Tensor, norm_I: torch.Tensor) -> torch.Tensor:
    """|W| * norm, in float32."""
    return weight_JI.float().abs() * norm_I.to(weight_JI.device, torch.float32)


def neuron_scores(weight_JI: torch.Tensor, norm_I: torch.Tensor) -> torch.Tensor:
    """Row sums of |W| * norm, [J], without a second weight in memory."""
    norm_I = norm_I.to(weight_JI.device, torch.float32)
    rows = max(CHUNK_VALUES // weight_JI.shape[1], 1)
    return torch.cat([part.float().abs() @ norm_I for part in weight_JI.split(rows)])
