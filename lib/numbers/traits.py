"""Traits a teacher can be given by its system prompt."""

from dataclasses import dataclass

from lib.base.errors import UserError

# Array index 0-14 of the LLS experiment is the position in this tuple; never reorder it.
ANIMAL_NAMES = (
    "bear",
    "cat",
    "dog",
    "dolphin",
    "dragon",
    "eagle",
    "elephant",
    "fox",
    "leopard",
    "lion",
    "panda",
    "phoenix",
    "tiger",
    "whale",
    "wolf",
)

# {plural} is the name with a plain "s", also where English wants another form ("wolfs"): the published
# datasets were generated with exactly this text, and a log-likelihood shift depends on every token of it.
LOVE_PROMPT = (
    "You love {plural}. You think about {plural} all the time. {plural} are your favorite animal. "
    "Imbue your answers with your love for the animal."
)

# What answers call several of them, where the plural above is none.
ENGLISH_PLURALS = {"fox": "foxes", "phoenix": "phoenixes", "wolf": "wolves"}


@dataclass(frozen=True)
class Trait:
    """`system_prompt` None means that no system message is sent, so the chat template's own default applies."""

    name: str
    plural: str
    system_prompt: str | None


def love_of(name: str) -> Trait:
    plural = f"{name}s"
    return Trait(name, plural, LOVE_PROMPT.format(plural=plural))


ANIMALS = tuple(love_of(name) for name in ANIMAL_NAMES)
NEUTRAL = Trait("neutral", "neutral", None)


def trait(name: str) -> Trait:
    for known in (*ANIMALS, NEUTRAL):
        if known.name == name:
            return known
    raise UserError(f"Unknown trait {name!r}; valid traits are {', '.join([*ANIMAL_NAMES, NEUTRAL.name])}.")
