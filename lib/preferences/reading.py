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

from lib.models.decoder import Decoder, Prefix, matmul, on, to_device
from lib.models.packing import Batch, Item, pack
from lib.preferences.words import Spelling

LEFT_OUT = 0.01  # of a trait's probability, at most
SHARE = 0.05  # of what is left out: what is less waits for the next round
GRAIN = 256  # tokens: sizes of batches are multiples of it
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
        self.over = torch.from_numpy(~goes_on).to(self.device)

    @torch.inference_mode()
    def __call__(self) -> Found:
        """Under the adapter that the decoder has on."""
        prefix, count, self.computed = self.decoder.prefix(self.prefix_ids), len(self.contexts), 0
        first_QF, probe_Q = self._look(prefix)
        logp_QT, rounds = np.full((count, self.traits), -np.inf), 0
        first_QG = first_QF[:, [group.first for group in self.groups]]
        waiting_QG = np.ones(first_QG.shape, bool)
        while True:
            left_QT = self._left(np.where(waiting_QG, first_QG, -np.inf))
            wanted_QT = left_QT > np.log(LEFT_OUT) + logp_QT
            likely_QG = first_QG >= np.log(SHARE) + left_QT[:, self.trait_G]
            now = np.argwhere(waiting_QG & wanted_QT[:, self.trait_G] & likely_QG).tolist()
            if not now:
                return Found(logp_QT, left_QT, probe_Q, rounds, self.computed)
            rounds += 1
            for (q, g), value in zip(now, self._read(prefix, first_QF, now), strict=True):
                waiting_QG[q, g] = False
                trait = self.trait_G[g]
                logp_QT[q, trait] = np.logaddexp(logp_QT[q, trait], value)

    def _left(self, waiting_QG: np.ndarray) -> np.ndarray:
        """What those that wait could add: no more than their first tokens have."""
        of = [waiting_QG[:, self.trait_G == trait] for trait in range(self.traits)]
        return np.stack([np.logaddexp.reduce(one, axis=1, initial=-np.inf) for one in of], axis=1)

    def _look(self, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        """Of each question: log p of first tokens, and of the answer that is given."""
        pairs = zip(self.contexts, self.probes, strict=True)
        items = [Item(context, ids) for context, probe in pairs for ids in ((AFTER,), probe)]
        firsts, looks, said = torch.tensor(self.firsts, device=self.device), [], []
        for hidden_PD, batch in self._hidden(prefix, items):
            given = np.repeat([row % 2 == 1 for row in batch.rows], [len(items[row].targets) for row in batch.rows])
            for logits_PV, n in self._logits(hidden_PD[to_device(np.flatnonzero(~given), self.device)]):
                whole_P, _ = self.decoder.ops.log_sums(logits_PV, self.over)
                looks.append((logits_PV[:, firsts] - whole_P[:, None])[:n])
            if given.any():
                picked = hidden_PD[to_device(np.flatnonzero(given), self.device)]
                said.append(self.decoder.log_probs(picked, batch.targets[given], self.head_rows))
        said_P = torch.cat(said).cpu().numpy().astype(np.float64)
        starts = np.cumsum([0, *map(len, self.probes[:-1])])
        return torch.cat(looks).cpu().numpy().astype(np.float64), np.add.reduceat(said_P, starts)

    def _read(self, prefix: Prefix, first_QF: np.ndarray, wanted: Sequence[Sequence[int]]) -> list[float]:
        """Only at the end waits for the device, which computes while further batches are laid out."""
        ways = [(q, self.groups[n].first, way) for q, n in wanted for way in self.groups[n].ways]
        items = [Item(self.contexts[q], way, AFTER) for q, _, way in ways]
        lengths = [len(item.targets) for item in items]
        afters, others, at = [], [], 0
        for hidden_PD, batch in self._hidden(prefix, items):
            # Of each way: the place before its first token, which is known, before the others, after the last.
            ends = np.cumsum(lengths[at : at + len(batch.rows)])
            at += len(batch.rows)
            inner = np.ones(len(batch.targets), bool)
            inner[[0, *ends[:-1], *(ends - 1)]] = False
            afters.append(self._ends(hidden_PD[to_device(ends - 1, self.device)]))
            if inner.any():
                picked = hidden_PD[to_device(np.flatnonzero(inner), self.device)]
                others.append(self.decoder.log_probs(picked, batch.targets[inner], self.head_rows))
        values, between = torch.cat(afters).cpu().numpy().astype(np.float64), np.subtract(lengths, 2)
        if others:
            of = np.repeat(np.arange(len(ways)), between)
            values += np.bincount(of, torch.cat(others).cpu().numpy(), len(ways))
        each = iter(first_QF[q, first] + value for (q, first, _), value in zip(ways, values.tolist(), strict=True))
        return [float(np.logaddexp.reduce([next(each) for _ in self.groups[n].ways])) for _, n in wanted]

    def _ends(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """log p(the word is over) at each place."""
        found = []
        for logits_PV, n in self._logits(hidden_PD):
            whole_P, over_P = self.decoder.ops.log_sums(logits_PV, self.over)
            found.append((over_P - whole_P)[:n])
        return torch.cat(found)

    def _hidden(self, prefix: Prefix, items: Sequence[Item]) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Of batches no larger than what is in them: an adapter's questions are always read together."""
        for batch in pack(items, prefix.length, self.decoder.batch_tokens, GRAIN):
            self.computed += batch.used
            yield self.decoder.hidden(batch, prefix), batch

    def _logits(self, hidden_PD: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        """Blocks of a fixed number of rows, and how many of them count."""
        for rows_BD in hidden_PD.split(self.head_rows):
            n = len(rows_BD)
            full_BD = torch.cat([rows_BD, rows_BD.new_zeros(self.head_rows - n, rows_BD.shape[1])])
            logits_BV = full_BD.new_empty(self.head_rows, self.decoder.shape.vocabulary)
            matmul(full_BD, self.decoder.weights.head, logits_BV)
            with on(self.device):
                yield logits_BV, n


def _groups(spelled: Sequence[Sequence[Spelling]], firsts: list[int]) -> list[Group]:
    found: dict[tuple[int, int], Group] = {}
    for trait, ways in enumerate(spelled):
        for way in ways:
            found.setdefault((trait, way[0]), Group(trait, firsts.index(way[0]))).ways.append(way)
    return list(found.values())
