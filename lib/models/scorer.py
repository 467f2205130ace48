"""log p(token | everything before it) for the scored tokens of many rows under one prefix."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lib.models.decoder import Decoder, Prefix
from lib.models.packing import Item, pack

CHECK_STEP = 256  # tokens; batches of single rows are multiples of it


class Scorer:
    """Counts what it computes: tokens in batches, padding included, against tokens that had to be."""

    def __init__(self, decoder: Decoder, head_rows: int) -> None:
        self.decoder, self.head_rows, self.batch_tokens = decoder, head_rows, decoder.batch_tokens
        self.computed = self.needed = 0

    def __call__(self, prefix: Prefix, items: Sequence[Item]) -> list[np.ndarray]:
        """One array of log-probabilities an item, as long as its targets."""
        return self.begin(prefix, items)()

    def begin(self, prefix: Prefix, items: Sequence[Item]) -> Callable[[], list[np.ndarray]]:
        """The same; only what is returned waits for the device, which can be given more to do before."""
        batches, values = [], []
        for batch in pack(items, prefix.length, self.batch_tokens):
            hidden = self.decoder.hidden(batch, prefix)
            values.append(self.decoder.log_probs(hidden, batch.targets, self.head_rows))
            batches.append(batch)
            self.computed += len(batch.ids)
            self.needed += batch.used

        def wait() -> list[np.ndarray]:
            found: list[np.ndarray] = [np.empty(0, np.float32)] * len(items)
            flat, at = torch.cat(values).cpu().numpy() if values else np.empty(0, np.float32), 0
            for row in (row for batch in batches for row in batch.rows):
                end = at + len(items[row].targets)
                found[row], at = flat[at:end], end
            return found

        return wait

    def one_by_one(self, prefix: Prefix, items: Sequence[Item]) -> list[np.ndarray]:
        """The same, each item in a batch of its own, as small as its length allows: for samples in a slow precision."""
        found = []
        for item in items:
            self.batch_tokens = -(-(len(item.context) + len(item.inputs)) // CHECK_STEP) * CHECK_STEP
            found += self(prefix, [item])
        return found
