"""Ways to rank neurons for pruning: contrasts of attributions, and the controls that a contrast has to beat."""

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "lrp", "absolute", "gradient", "wanda", "activation", "undesired", "magnitude", "matched", "random"
]  # in the order of the cells
WORDS: dict[Method, str] = {
    "lrp": "relevance, contrasted",
    "absolute": "|W × gradient|, contrasted",
    "gradient": "value × plain gradient, contrasted",
    "wanda": "Wanda, contrasted",
    "activation": "activation, contrasted (forward only)",
    "undesired": "relevance on the behaviour alone",
    "magnitude": "smallest weights",
    "matched": "random, as many in each layer",
    "random": "random",
}
# What a method is read from: the experiment as it is configured, or with the plain gradient, or the activations.
SOURCES: dict[Method, Literal["own", "gradient", "activation"]] = {
    "lrp": "own",
    "absolute": "own",
    "wanda": "own",
    "undesired": "own",
    "matched": "own",
    "gradient": "gradient",
    "activation": "activation",
}
COLUMNS: dict[Method, Literal["signed", "abs", "sumsq"]] = {
    "lrp": "signed",
    "absolute": "abs",
    "gradient": "signed",
    "wanda": "sumsq",
    "activation": "sumsq",
    "undesired": "signed",
    "matched": "signed",
}
CONTRASTED: tuple[Method, ...] = ("lrp", "absolute", "gradient", "wanda", "activation")
DRAWN: tuple[Method, ...] = ("matched", "random")


@dataclass(frozen=True)
class Ranking:
    """What a cell of a selection ranks by."""

    method: Method
    seed: int | None = None  # of general text; None: the mean over all seeds
    draw: int | None = None  # of a random control

    @property
    def name(self) -> str:
        number = self.draw if self.seed is None else self.seed
        return self.method if number is None else f"{self.method}-{number}"
