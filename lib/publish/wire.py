"""Requests to the Hub, all of them: huggingface_hub makes each through the client of this file.

The library repeats some calls by itself when the Hub is busy, others not, and asks for a new repository again and again
without a pause while another one is being made. Here what may be different in a moment is one kind of error, `Busy`,
whatever the call, and who made the call decides how long to wait: see hub.py. Not imported before the HF_* are set."""

import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import hf_request_event_hook

TRANSIENT = (408, 412, 425, 429, 500, 502, 503, 504)  # 412: somebody else's commit came between
IN_PROGRESS = "another conflicting operation is in progress"  # 409: a repository of the user's is being made
TIMEOUT = httpx2.Timeout(60.0, read=300.0, write=300.0)  # the library's own is none: a silent Hub would be waited for
LONGEST = 366 * 86400.0  # of what a Hub, or who poses as one, can ask to be waited for
UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


class Busy(Exception):
    """No for now. `seconds`: what the Hub asks for; None: it does not say."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.why, self.seconds = why, seconds


class Client(httpx2.Client):
    def __init__(self, endpoint: str, pace: Callable[[], None]) -> None:
        hub = httpx2.URL(endpoint)

        def paced(request: httpx2.Request) -> None:
            if (request.url.host, request.url.port) == (hub.host, hub.port):  # storage does not count
                pace()

        hooks: dict[str, list[Callable[..., Any]]] = {"request": [hf_request_event_hook, paced]}
        super().__init__(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            response = super().send(request, **options)
            if response.status_code < 400:
                return response
            response.read()
        except httpx2.TransportError as e:
            raise Busy(f"the connection failed ({type(e).__name__})") from e
        if response.status_code in TRANSIENT or (response.status_code == 409 and IN_PROGRESS in response.text):
            raise Busy(f"the Hub answered {response.status_code}", asked_seconds(response))
        return response


def install(endpoint: str, pace: Callable[[], None]) -> None:
    set_client_factory(lambda: Client(endpoint, pace))


def asked_seconds(response: httpx2.Response) -> float | None:
    """How long to wait, by what the Hub says where it says so: the window that is used up (its headers tell of the
    window whether or not that is the reason), Retry-After in seconds or as a date, or the text of its quotas."""
    window = parse_ratelimit_headers(response.headers)
    if window and window.remaining == 0:
        return min(float(window.reset_in_seconds + 1), LONGEST)
    after = response.headers.get("Retry-After", "").strip()
    if after.isdecimal():
        return min(float(after), LONGEST)
    if after:
        try:
            return min(max(0.0, parsedate_to_datetime(after).timestamp() - time.time()), LONGEST)
        except (ValueError, OverflowError):
            return None
    said = re.search(r"\bin (?:about )?(\d{1,4}|an?) (second|minute|hour|day)", response.text[:2000])
    return float((int(said[1]) if said[1].isdecimal() else 1) * UNITS[said[2]]) if said else None
