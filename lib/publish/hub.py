"""The Hub as publishing sees it: what lies there is looked at, what differs is sent, and it is looked at again.

Each call may be made again from its beginning: it begins with a look. Not imported before the site's HF_* variables are
set, since huggingface_hub reads them when it is imported."""

import logging
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

from huggingface_hub import Collection, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from lib.base.atomic import read_json, write_json
from lib.base.errors import UserError
from lib.base.turns import one_at_a_time
from lib.base.typed import Mistyped, parse
from lib.inputs.hub import causes
from lib.publish.files import File
from lib.publish.ledger import CALLS, COMMITS, DAY, FIVE_MINUTES, HOUR, NEW, Ledger
from lib.publish.login import LOGIN, Login, sentence, token
from lib.publish.names import USER, Type
from lib.publish.plan import Limits
from lib.publish.wire import Busy, install
from lib.run.lifecycle import Terminated

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT, TRIES = 1.0, 60.0, 8  # where the Hub does not say how long: 1, 2, 4, ... seconds
SPOKEN = {NEW: "new repositories a day", COMMITS: "commits an hour", CALLS: "calls in 5 minutes"}
BLOCK = 10  # calls are noted by so many at once


@dataclass(frozen=True)
class Noted:
    """Which collection this scratch puts things into."""

    slug: str
    title: str


@dataclass(frozen=True)
class Sent:
    """What became of a repository."""

    outcome: str  # new, changed, or as it was
    commit: str
    files: int
    bytes: int  # of the files that were sent


@dataclass(frozen=True)
class Remote:
    """A repository as it is on the Hub."""

    commit: str
    private: bool
    files: dict[str, str]  # path -> sha256 of a large file, git's id of another one

    def lacks(self, files: Sequence[File]) -> list[File]:
        return [file for file in files if self.files.get(file.path) not in (file.sha256, file.blob)]


class Hub:
    def __init__(
        self, limits: Limits, wait_minutes: float, ledger: Callable[[str], Ledger], warned: Callable[[], bool]
    ) -> None:
        """`ledger`: of a user. `warned`: whether the time limit is near, so that nothing is waited for any more."""
        self.limits, self.longest, self.ledger_of, self.warned = limits, 60 * wait_minutes, ledger, warned
        self.ledger: Ledger | None = None
        self.calls = self.credit = 0
        self.counting = Lock()
        self.collections: dict[str, tuple[str, set[str]]] = {}  # by title: slug, items
        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it says of a call is said here
        install(constants.ENDPOINT, self._pace)
        self.api = HfApi()

    def open(self, owner: str) -> str:
        """Look whose login it is, and whether it may write; returns who owns what will be made."""
        if constants.is_offline_mode():
            raise UserError("publishing needs the Hub, and HF_HUB_OFFLINE is set: unset it, on a node with a network")
        if not token():
            raise UserError(f"no token of the Hub in {constants.HF_TOKEN_PATH}: {LOGIN}")
        try:
            me = parse(Login, self._patiently("the Hub, asked whose login it is", self.api.whoami))
            if not USER.fullmatch(me.name):  # it becomes a file's name
                raise Mistyped("name")
        except Mistyped:
            raise UserError(f"{constants.ENDPOINT} does not say whose login it is; check HF_ENDPOINT") from None
        owners = [me.name, *(one.get("name") for one in me.orgs if isinstance(one, dict))]
        if owner and owner not in owners:
            raise UserError(
                f"the login is {me.name}'s, which cannot publish as {owner}: {LOGIN}, or change user or HF_USER_ID"
            )
        if (me.auth.get("accessToken") or {}).get("role") == "read":
            raise UserError(f"the token of {me.name} may only read: {LOGIN}")
        self.ledger = self.ledger_of(owner or me.name)
        return owner or me.name

    def publish(self, type: Type, id: str, private: bool, files: Sequence[File], message: str) -> Sent:
        """Bring a repository to hold these files, beside others that it may hold."""
        what, sent, new = f"{type} {id}", {}, False

        def once() -> Remote:
            nonlocal new
            remote = self._look(type, id)
            if remote is None:
                self._allowed(NEW, self.limits.new_repositories, DAY, f"{type}:{id}")
                self._make(type, id, private)
                new = True
                remote = self._look(type, id)
            if remote is None:
                raise Busy("the repository was made and is not there yet")
            if remote.private != private:
                is_, said = ("private", "false") if remote.private else ("public", "true")
                raise UserError(f"{what} is {is_} on the Hub, and here it says private: {said}; change one of the two")
            if not (other := remote.lacks(files)):
                return remote
            sent.update({file.path: file.size for file in other})
            self._allowed(COMMITS, self.limits.commits_an_hour, HOUR)
            operations = [CommitOperationAdd(file.path, file.content) for file in other]
            self.api.create_commit(
                id, operations, commit_message=message, repo_type=type, parent_commit=remote.commit or None
            )
            after = self._look(type, id)
            if after is None or after.lacks(files):
                lost = sorted(file.path for file in after.lacks(files)) if after else ["all of it"]
                raise UserError(
                    f"{what}: the Hub holds other bytes than were sent ({', '.join(lost)}); try again later"
                )
            return after

        commit = self._patiently(what, once).commit
        outcome = "new" if new else "changed" if sent else "as it was"
        return Sent(outcome, commit, len(files), sum(sent.values()))

    def _make(self, type: Type, id: str, private: bool) -> None:
        try:
            self.api.create_repo(id, repo_type=type, private=private)
        except HfHubHTTPError as e:
            if e.response.status_code != 409:
                raise
            raise Busy("somebody else has just made it") from None  # and will fill it

    def _look(self, type: Type, id: str) -> Remote | None:
        try:
            ask = self.api.dataset_info if type == "dataset" else self.api.model_info
            info = ask(id, files_metadata=True)
        except RepositoryNotFoundError:
            return None
        found = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings or []}
        return Remote(info.sha or "", bool(info.private), {path: str(id) for path, id in found.items()})

    def collect(self, title: str, owner: str, private: bool, record: Path, type: Type, id: str) -> None:
        """Put a repository into the collection of that title, which is made where there is none. `record`: where its
        name on the Hub is noted."""

        def once() -> None:
            if title not in self.collections:
                with one_at_a_time(record.with_suffix(".lock"), f"collection {title}"):
                    self.collections[title] = self._collection(title, owner, private, record)
            slug, items = self.collections[title]
            if f"{type}:{id}" not in items:
                self.api.add_collection_item(slug, id, type, exists_ok=True)
                items.add(f"{type}:{id}")

        self._patiently(f"collection {title}", once)

    def _collection(self, title: str, owner: str, private: bool, record: Path) -> tuple[str, set[str]]:
        found = None
        with suppress(Mistyped):
            noted = parse(Noted, read_json(record))
            found = self._read_collection(noted.slug) if noted.title == title else None
        if found is None and (first := self._first_collection(title, owner)):
            found = self._read_collection(first)
        found = found or self._make_collection(title, owner, private)
        write_json(record, asdict(Noted(found.slug, title)))
        return found.slug, {f"{one.item_type}:{one.item_id}" for one in found.items}

    def _first_collection(self, title: str, owner: str) -> str:
        """Of those of this title the slug of the one that was made first, which a slug's end begins with; '' for none:
        a list may lag behind."""
        mine = self.api.list_collections(owner=owner)
        slugs = [one.slug for one in mine if one.title == title and one.slug.startswith(f"{owner}/")]
        return min(slugs, default="")

    def _make_collection(self, title: str, owner: str, private: bool) -> Collection:
        """Two machines share no lock: of two that are made at once the later one goes, before anything is in it."""
        made = self.api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        first = self._first_collection(title, owner)
        if first in ("", made.slug) or made.items:
            return made
        self.api.delete_collection(made.slug, missing_ok=True)
        found = self._read_collection(first)
        if found is None:
            raise Busy("it was removed meanwhile")
        return found

    def _read_collection(self, slug: str) -> Collection | None:
        """With all its items; a list of collections holds the first few alone."""
        try:
            return self.api.get_collection(slug)
        except HfHubHTTPError as e:
            if e.response.status_code != 404:
                raise
            return None

    def _pace(self) -> None:
        """Before each request. They are noted by the block, so that noting takes no time."""
        with self.counting:  # several large files are sent by as many threads
            self.calls, self.credit = self.calls + 1, self.credit - 1
            if self.ledger and self.credit < 0:  # nobody knows at first whose they are
                count = max(BLOCK, -self.credit)
                self._allowed(CALLS, self.limits.calls, FIVE_MINUTES, count=count)
                self.credit += count

    def _allowed(self, kind: str, most: int, window: float, what: str = "", count: int = 1) -> None:
        """Wait until it is within what the Hub allows; a UserError where that takes too long."""
        assert self.ledger is not None
        while wait := self.ledger.take(kind, most, window, count, what):
            limit = f"{most:,} {SPOKEN[kind]} of this user are spent"
            if wait > self.longest:
                raise UserError(
                    f"{limit} until {_clock(wait)}; what is published stays, `make resume` then does the rest"
                )
            print(f"{limit}: going on at {_clock(wait)}", flush=True)
            self.wait(wait)

    def wait(self, seconds: float) -> None:
        """To the warning at most: then the task is requeued, and waits on."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.warned():
                raise Terminated(signal.SIGUSR1)
            time.sleep(min(left, 1.0))

    def _patiently(self, what: str, call: Callable[[], T]) -> T:
        """What does not work now is tried again: when the Hub says so, or after waits that double."""
        usual, tries, waited = FIRST_WAIT, 1, 0.0
        while True:
            try:
                return call()
            except UserError:
                raise
            except Exception as e:
                if inner := next((cause for cause in causes(e) if isinstance(cause, UserError)), None):
                    raise inner from None
                busy = next((cause for cause in causes(e) if isinstance(cause, Busy)), None)
                if busy is None:
                    raise UserError(sentence(what, e)) from None
                wait = usual if busy.seconds is None else busy.seconds
                if waited + wait > self.longest or tries == TRIES:
                    asks = "" if busy.seconds is None else f" and asks to wait until {_clock(wait)}"
                    raise UserError(
                        f"{what}: {busy.why}{asks}, tried {tries} times; what is published stays, `make resume` later "
                        "does the rest"
                    ) from None
                print(f"{what}: {busy.why}; again in {wait:.0f} s", flush=True)
                self.wait(wait)
                tries, waited, usual = tries + 1, waited + wait, min(2 * usual, LONGEST_WAIT)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds + 59))  # a minute that has begun
