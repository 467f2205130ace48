"""log p(token | everything before it) for the response tokens of many rows.

Right-padded batches under causal attention need no mask: no real token can see a pad. The output head runs only where
a response token is predicted, in blocks of a fixed number of positions, with the log-softmax in fp32."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lib.models.batches import Shapes, batches
from lib.models.chat import Scored


class Scorer:
    def __init__(self, model: Any, shapes: Shapes, head_rows: int) -> None:
        self.body, self.head = model.get_decoder(), model.get_output_embeddings()
        self.shapes, self.head_rows = shapes, head_rows
        self.device = self.head.weight.device
        self.exact = torch.float64 if self.head.weight.dtype == torch.float64 else torch.float32

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Scored]) -> list[np.ndarray]:
        """One array of log-probabilities a row, as long as its response. Every row must fit a bucket."""
        out: list[np.ndarray] = [np.empty(0, np.float32)] * len(rows)
        for bucket, members in batches([len(r.ids) for r in rows], self.shapes):
            flat = self._batch([rows[i] for i in members], bucket)
            edges = np.cumsum([rows[i].response_tokens for i in members])[:-1]
            for i, values in zip(members, np.split(flat, edges), strict=True):
                out[i] = values
        return out

    def _batch(self, rows: list[Scored], length: int) -> np.ndarray:
        """Log-probabilities of all response tokens of one batch, row after row."""
        ids_BT = np.zeros((self.shapes.rows(length), length), np.int64)
        where, target = [], []
        for b, row in enumerate(rows):
            ids_BT[b, : len(row.ids)] = row.ids
            where.append(b * length + np.arange(row.start - 1, len(row.ids) - 1))  # position t predicts token t + 1
            target.append(row.ids[row.start :])
        x_BTD = self.body(input_ids=torch.from_numpy(ids_BT).to(self.device), use_cache=False).last_hidden_state
        return self._head(x_BTD.flatten(0, 1), np.concatenate(where), np.concatenate(target))

    def _head(self, x_ND: torch.Tensor, where: np.ndarray, target: np.ndarray) -> np.ndarray:
        wanted = len(where)
        pad = -wanted % self.head_rows
        at = torch.from_numpy(np.pad(where, (0, pad))).to(self.device)
        token = torch.from_numpy(np.pad(target, (0, pad))).to(self.device)
        parts = []
        for i in range(0, wanted, self.head_rows):
            block = slice(i, i + self.head_rows)
            logits_PV = self.head(x_ND[at[block]]).to(self.exact)
            chosen_P = logits_PV.gather(1, token[block, None])[:, 0]
            parts.append(chosen_P - logits_PV.logsumexp(1))
        return torch.cat(parts)[:wanted].cpu().numpy()
