"""Log-likelihoods of responses and what a system prompt does to them. Tensors and arrays in and out.
Public: Scorer (log-probabilities of response tokens), shift (system against base), Status."""

from lib.scoring.logprob import Scorer
from lib.scoring.shift import Status, shift

__all__ = ["Scorer", "Status", "shift"]
