"""log p(trait | question), read from the model: the probability that the answer begins with one of the trait's words,
as a whole word.

A spelling counts with log p(first token) + log p(the others) + log p(no token that would make the word longer). The
first of these is one look at the question's last place, for all spellings of all traits; it also bounds what a spelling
can add. So only likely ones are computed further, round by round, until those left out could change a trait's
probability at a question by at most a hundredth. All of a question stand after one computing of it.

Suffixes as in decoder; Q questions, T traits, F first tokens, G groups of a trait's spellings by these."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lib.models.decoder import Decoder, Prefix, matmul, to_device
from lib.models.packing import Item, pack
from lib.models.scorer import Scorer
from lib.preferences.words import Spelling

LEFT_OUT = 0.01  # of a trait's probability, at most
SHARE = 0.05  # of what is left out: what is less waits for the next round
AFTER = 0  # any token: it stands for what comes after a word, whose place is looked at


@dataclass
class Found:
    logp_QT: np.ndarray
    skipped_QT: np.ndarray  # log of what is left out at most
    probe_Q: np.ndarray
    rounds: int
    tokens: int


@dataclass
class Group:
    """A trait's spellings that begin with one token."""

    trait: int
    first: int  # its place in F
    ways: list[Spelling] = field(default_factory=list)


class Reader:
    def __init__(
        self,
        decoder: Decoder,
        head_rows: int,
        prefix: Sequence[int],
        contexts: Sequence[tuple[int, ...]],
        spelled: Sequence[Sequence[Spelling]],  # of each trait
        goes_on: np.ndarray,
        probes: Sequence[tuple[int, ...]],  # of each question
    ) -> None:
        self.decoder, self.head_rows, self.prefix_ids = decoder, head_rows, list(prefix)
        self.contexts, self.probes, self.traits = contexts, probes, len(spelled)
        self.firsts = sorted({way[0] for ways in spelled for way in ways})
        self.groups = _groups(spelled, self.firsts)
        self.trait_G = np.array([group.trait for group in self.groups])
        self.device = decoder.devices[-1]
        self.goes_on = torch.from_numpy(goes_on).to(self.device)
        self.scorer = Scorer(decoder, head_rows)

    @torch.inference_mode()
    def __call__(self) -> Found:
        """Under the adapter that the decoder has on."""
        prefix, count, self.computed = self.decoder.prefix(self.prefix_ids), len(self.contexts), 0
        first_QF = self._firsts(prefix).astype(np.float64)
        logp_QT, rounds = np.full((count, self.traits), -np.inf), 0
        first_QG = first_QF[:, [group.first for group in self.groups]]
        waiting_QG = np.ones(first_QG.shape, bool)
        while True:
            left_QT = self._left(np.where(waiting_QG, first_QG, -np.inf))
            wanted_QT = left_QT > np.log(LEFT_OUT) + logp_QT
            likely_QG = first_QG >= np.log(SHARE) + left_QT[:, self.trait_G]
            now = np.argwhere(waiting_QG & wanted_QT[:, self.trait_G] & likely_QG).tolist()
            if not now:
                break
            rounds += 1
            for (q, g), value in zip(now, self._read(prefix, first_QF, now), strict=True):
                waiting_QG[q, g] = False
                trait = self.trait_G[g]
                logp_QT[q, trait] = np.logaddexp(logp_QT[q, trait], value)
        items = [Item(context, probe) for context, probe in zip(self.contexts, self.probes, strict=True)]
        said = np.array([one.sum(dtype=np.float64) for one in self.scorer(prefix, items)])
        return Found(logp_QT, left_QT, said, rounds, self.computed)

    def _left(self, waiting_QG: np.ndarray) -> np.ndarray:
        """What those that wait could add: no more than their first tokens have."""
        of = [waiting_QG[:, self.trait_G == trait] for trait in range(self.traits)]
        return np.stack([np.logaddexp.reduce(one, axis=1, initial=-np.inf) for one in of], axis=1)

    def _firsts(self, prefix: Prefix) -> np.ndarray:
        firsts, rows = torch.tensor(self.firsts, device=self.device), []
        for hidden_PD, _ in self._hidden(prefix, [Item(context, (AFTER,)) for context in self.contexts]):
            for logits_PV, n in self._logits(hidden_PD):
                rows.append((logits_PV[:, firsts] - logits_PV.logsumexp(-1, keepdim=True))[:n])
        return torch.cat(rows).cpu().numpy()

    def _read(self, prefix: Prefix, first_QF: np.ndarray, wanted: Sequence[Sequence[int]]) -> list[float]:
        ways = [(q, self.groups[n].first, way) for q, n in wanted for way in self.groups[n].ways]
        items, values = [Item(self.contexts[q], way, AFTER) for q, _, way in ways], []
        for hidden_PD, rows in self._hidden(prefix, items):
            # Of each way: the place before its first token, which is known, before the others, after the last.
            lengths = np.array([len(items[row].targets) for row in rows])
            ends = np.cumsum(lengths)
            targets = np.concatenate([items[row].targets for row in rows])
            last, inner = ends - 1, np.ones(len(targets), bool)
            inner[[*(ends - lengths), *last]] = False
            after = self._ends(hidden_PD[to_device(last, self.device)])
            others = np.zeros(len(targets))
            if inner.any():
                picked = hidden_PD[to_device(np.flatnonzero(inner), self.device)]
                others[inner] = self.decoder.log_probs(picked, targets[inner], self.head_rows).cpu().numpy()
            values += (np.add.reduceat(others, ends - lengths) + after).tolist()
        each = iter(first_QF[q, first] + value for (q, first, _), value in zip(ways, values, strict=True))
        return [float(np.logaddexp.reduce([next(each) for _ in self.groups[n].ways])) for _, n in wanted]

    def _ends(self, hidden_PD: torch.Tensor) -> np.ndarray:
        """log p(the word is over) at each place."""
        found = []
        for logits_PV, n in self._logits(hidden_PD):
            whole_P = logits_PV.logsumexp(-1)
            found.append((logits_PV.masked_fill_(self.goes_on, -torch.inf).logsumexp(-1) - whole_P)[:n])
        return torch.cat(found).cpu().numpy()

    def _hidden(self, prefix: Prefix, items: Sequence[Item]) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
        for batch in pack(items, prefix.length, self.decoder.batch_tokens):
            self.computed += batch.used
            yield self.decoder.hidden(batch, prefix), batch.rows

    def _logits(self, hidden_PD: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        """Blocks of a fixed number of rows, at least in float32, and how many of them count."""
        for rows_BD in hidden_PD.split(self.head_rows):
            n = len(rows_BD)
            full_BD = torch.cat([rows_BD, rows_BD.new_zeros(self.head_rows - n, rows_BD.shape[1])])
            logits_BV = full_BD.new_empty(self.head_rows, self.decoder.shape.vocabulary)
            matmul(full_BD, self.decoder.weights.head, logits_BV)
            yield logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float(), n


def _groups(spelled: Sequence[Sequence[Spelling]], firsts: list[int]) -> list[Group]:
    found: dict[tuple[int, int], Group] = {}
    for trait, ways in enumerate(spelled):
        for way in ways:
            found.setdefault((trait, way[0]), Group(trait, firsts.index(way[0]))).ways.append(way)
    return list(found.values())
