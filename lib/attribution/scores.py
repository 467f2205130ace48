"""A layer's scores from what passes through it: its input x, its output y and the output's gradient dy.

Suffixes: B samples, T tokens of a sample, J outputs, I inputs. Padding stands at the end of a sample; it gets no
gradient, so only sums of squares have to leave it out."""

import torch

from lib.attribution.rules import kernels
from lib.models.plain_ops import accurate


def signed_neurons(y_BTJ: torch.Tensor, dy_BTJ: torch.Tensor) -> torch.Tensor:
    """Relevance of each output: sum_t y * dy, [B, J]."""
    fast = kernels(y_BTJ)
    if fast:
        return fast.dots(y_BTJ, dy_BTJ)
    wide = accurate(y_BTJ.dtype)
    return (y_BTJ.to(wide) * dy_BTJ.to(wide)).sum(1)


def abs_neurons(x_BTI: torch.Tensor, dy_BTJ: torch.Tensor, weight_JI: torch.Tensor) -> torch.Tensor:
    """sum_i |W_ji G_ji| of each sample, [B, J]; G is the sample's own gradient of the weights."""
    fast = kernels(x_BTI)
    if fast:
        return fast.abs_neurons(x_BTI, dy_BTJ, weight_JI)
    wide = accurate(x_BTI.dtype)
    return torch.stack([(_gradient(x, dy, wide) * weight_JI).abs().sum(1) for x, dy in zip(x_BTI, dy_BTJ, strict=True)])


def add_weights(
    total_JI: torch.Tensor, x_BTI: torch.Tensor, dy_BTJ: torch.Tensor, weight_JI: torch.Tensor, magnitude: bool
) -> None:
    """total += sum over samples of W * G, or of |W * G|, sample after sample."""
    fast = kernels(x_BTI)
    if fast:
        fast.add_weights(total_JI, x_BTI, dy_BTJ, weight_JI, magnitude)
        return
    wide = accurate(x_BTI.dtype)
    for x, dy in zip(x_BTI, dy_BTJ, strict=True):
        score = _gradient(x, dy, wide).mul_(weight_JI)
        total_JI += score.abs_() if magnitude else score


def squares(x_BTI: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    """sum over a sample's real tokens of x^2, [B, I]: Wanda's statistic, added up in float32."""
    fast = kernels(x_BTI)
    if fast:
        return fast.dots(x_BTI, x_BTI, length_B)
    real = torch.arange(x_BTI.shape[1], device=x_BTI.device)[None, :, None] < length_B[:, None, None]
    wide = x_BTI.to(accurate(x_BTI.dtype))
    return torch.where(real, wide, 0).square().sum(1)


def _gradient(x_TI: torch.Tensor, dy_TJ: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dy_TJ.to(dtype).t() @ x_TI.to(dtype)
