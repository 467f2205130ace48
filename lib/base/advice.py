"""The commands that messages advise, so that they can be pasted: with the CONFIG and SET that this process works on."""

import re
import shlex
from collections.abc import Sequence

_TARGETS = (
    "fetch|doctor|submit(?:-[a-z0-9]+)?|resume|cancel|status|logs|verify|export-[a-z]+|lls-report|sparc3-report"
    "|sparsity-report|save-pruned|anchors"
)
_ADVICE = re.compile(rf"`make ({_TARGETS})\b([^`]*)`( again)?(?: with this CONFIG)?")
_here: list[str] = []


def spoken(config: object, overrides: Sequence[str] = ()) -> str:
    """How an experiment is named to make, quoted for a shell."""
    words = [f"CONFIG={shlex.quote(str(config))}"]
    if overrides:
        words.append(f"SET={shlex.quote(shlex.join(overrides))}")
    return " ".join(words)


def about(config: object, overrides: Sequence[str] = ()) -> None:
    """From here on, advice is about this experiment."""
    _here[:] = [spoken(config, overrides)]


def advised(text: str) -> str:
    """A message whose `make TARGET` names the experiment."""

    def whole(found: re.Match[str]) -> str:
        target, rest, again = found.groups(default="")
        return found[0] if "CONFIG=" in rest or not _here else f"`make {target} {_here[0]}{rest}`{again}"

    return _ADVICE.sub(whole, text)
