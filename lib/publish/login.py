"""Whose login it is, and what is said where the Hub takes it or a call for no. Not imported before the HF_* are set."""

from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_token

from lib.base.errors import UserError, one_line
from lib.inputs.hub import causes

LOGIN = "log in with `.venv/bin/hf auth login`, by a token of https://huggingface.co/settings/tokens that may write"


@dataclass(frozen=True)
class Login:
    """As the Hub tells it."""

    name: str
    orgs: list[Any] = field(default_factory=list)
    auth: dict[str, Any] = field(default_factory=dict)


def token() -> str:
    """'' where there is none; a UserError where it cannot be read, or be sent."""
    try:
        found = get_token() or ""
        found.encode("ascii")
    except Exception as e:  # of the disk, or of whoever hands it out
        raise UserError(
            f"the token of the Hub in {constants.HF_TOKEN_PATH} cannot be read ({_why(e)}): {LOGIN}"
        ) from None
    return found


def _why(e: Exception) -> str:
    return e.strerror if isinstance(e, OSError) and e.strerror else type(e).__name__


def sentence(what: str, e: Exception) -> str:
    """What is wrong and what to do; of the Hub's own words what can be no secret."""
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in causes(e)):
        return f"{what}: there is no token; {LOGIN}"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(e)):
        return f"{what}: HF_HUB_OFFLINE is set; unset it, on a node with a network"
    answers = [cause.response for cause in causes(e) if isinstance(cause, HfHubHTTPError)]
    if not answers:
        return f"{what} cannot be published ({_without_token(f'{type(e).__name__}: {one_line(e)}')}); try again later"
    status = answers[0].status_code
    said = _without_token(next((c.server_message or "" for c in causes(e) if isinstance(c, HfHubHTTPError)), ""))
    why = f"{what}: the Hub answered {status}" + (f" ({said})" if said else "")
    match status:
        case 401:
            return f"{why}: it does not know the token; {LOGIN}"
        case 403:
            return f"{why}: the token may not do this; {LOGIN} there, or change user"
        case 402 | 413 | 507:
            return f"{why}: it has no room for this; free some at https://huggingface.co/settings/storage"
        case 404:
            return f"{why}: there is no such user, organisation or collection; check user and HF_USER_ID"
        case 400 | 409 | 422:
            return f"{why}: it does not take this; check hub_names and license in the configuration"
    return f"{why}; look at https://status.huggingface.co, and try again later"


def _without_token(text: str) -> str:
    try:
        known = token()
    except UserError:
        return "it is not known what of its words is secret"
    return one_line(Exception(text.replace(known, "(token)") if known else text))
