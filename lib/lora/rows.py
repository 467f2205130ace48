"""What a student is trained on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    ids: tuple[int, ...]  # the whole row as the chat template renders it
    first: int  # the loss is on ids[first:]; 1: on the whole row, else from the answer's first token on

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first
