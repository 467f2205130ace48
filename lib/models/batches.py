"""Batches of fixed shapes: the shape depends on a row's own length alone, never on its neighbours.

So the same row gives the same bits in any batch, order, shard or resume."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shapes:
    lengths: tuple[int, ...]  # ascending buckets
    batch_tokens: int

    def bucket(self, length: int) -> int | None:
        """The bucket a row of this length is padded to; None when it is too long for all."""
        i = bisect_left(self.lengths, length)
        return self.lengths[i] if i < len(self.lengths) else None

    def rows(self, bucket: int) -> int:
        """Rows of each batch of a bucket; the last batch is filled up with copies."""
        return max(1, self.batch_tokens // bucket)


def batches(lengths: Sequence[int], shapes: Shapes) -> Iterator[tuple[int, list[int]]]:
    """(bucket, row indices) for every row that fits, shortest bucket first."""
    by_bucket: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        bucket = shapes.bucket(length)
        if bucket is not None:
            by_bucket[bucket].append(i)
    for bucket in sorted(by_bucket):
        members, size = by_bucket[bucket], shapes.rows(bucket)
        for at in range(0, len(members), size):
            yield bucket, members[at : at + size]
