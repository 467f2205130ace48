"""The Hub at arm's length: model snapshots and dataset rows at one commit; whatever goes wrong is one sentence.

huggingface_hub and datasets read HF_HOME, HF_ENDPOINT and the token's path when they are imported: hence here, late."""

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lib.base.errors import FULL, UserError
from lib.inputs.records import MODEL_FILES, torch_weights
from lib.inputs.verified import hashes

T = TypeVar("T")
Row = dict[str, object]  # of a dataset: what it holds is looked at where it is used


def model_snapshot(id: str, revision: str) -> Path:
    """The folder <HF_HOME>/hub/models--.../snapshots/<commit>; a broken download goes on where it stopped, and a file
    that is not the one of the Hub's own sha256 is brought anew. Weights in torch's own format come only where there are
    no others; their copy as safetensors needs room too."""
    what = f"model {id} at {revision}"
    with _sentences(what):
        from huggingface_hub import HfApi, constants, snapshot_download

        _quiet()
        info = _patiently(lambda: HfApi().model_info(id, revision=revision, files_metadata=True))
        commit, siblings = commit_of(what, info.sha), info.siblings or []
        sizes = {s.rfilename: s.size for s in siblings}
        known = {s.rfilename: s.lfs.sha256 for s in siblings if s.lfs}
        convert = torch_weights(sizes)
        wanted = {
            name_of(what, name): size
            for name, size in sizes.items()
            if name in convert or any(Path(name).match(p) for p in MODEL_FILES)
        }
        store = Path(constants.HF_HUB_CACHE)
        snapshot = store / f"models--{id.replace('/', '--')}" / "snapshots" / commit
        for again in (False, True):
            missing = [name for name, size in wanted.items() if not _whole(snapshot / name, size, store)]
            _room(f"model {id}", sum(sizes[name] or 0 for name in [*missing, *convert]), store)
            snapshot = Path(snapshot_download(id, revision=commit, allow_patterns=[*MODEL_FILES, *convert]))
            here = {snapshot / name: known[name] for name in wanted if name in known}
            bad = [path for path, sha in zip(here, hashes(here), strict=True) if sha != here[path]]
            if not bad:
                return snapshot
            for path in bad:
                print(f"{path} is not the Hub's file (its sha256 differs)" + ("" if again else ": bringing it anew"))
                forget(path, store)
        raise UserError(f"{what}: {bad[0].name} came twice with another sha256 than the Hub states; try again later")


def dataset_rows(id: str, split: str, revision: str) -> tuple[Iterable[object], str]:
    """(rows, the commit that the revision stands for)."""
    with _sentences(f"dataset {id} at {revision}"):
        from datasets import load_dataset

        _quiet()
        commit = dataset_commit(id, revision)
        return load_dataset(id, split=split, revision=commit), commit


def dataset_commit(id: str, revision: str) -> str:
    """The commit that a revision stands for."""
    what = f"dataset {id} at {revision}"
    with _sentences(what):
        from huggingface_hub import HfApi

        return commit_of(what, _patiently(lambda: HfApi().dataset_info(id, revision=revision)).sha)


def dataset_stream(
    id: str, commit: str, config: str | None, split: str, shuffle: tuple[int, int] | None = None
) -> Iterator[Row]:
    """Rows as they come over the network, nothing kept on disk; `shuffle`: a seed and how many rows it holds."""
    with _sentences(f"dataset {id} at {commit[:12]}"):
        from datasets import load_dataset

        _quiet()
        rows = _patiently(lambda: load_dataset(id, config, split=split, revision=commit, streaming=True))
        yield from rows.shuffle(seed=shuffle[0], buffer_size=shuffle[1]) if shuffle else rows


def commit_of(what: str, sha: object) -> str:
    """A commit in the Hub's answer: it becomes a folder's name."""
    if not isinstance(sha, str) or not re.fullmatch("[0-9a-f]{40}", sha):
        raise UserError(f"{what}: the Hub's answer names a commit that is none ({str(sha)[:60]!r}); check HF_ENDPOINT")
    return sha


def name_of(what: str, name: object) -> str:
    """A file's name in the Hub's answer: it becomes a path below the model's folder, and never one elsewhere."""
    good = isinstance(name, str) and name.isprintable() and not set(name) & {"\\", ":"}
    if not good or {"", ".", ".."} & set(str(name).split("/")):
        raise UserError(f"{what}: a file's name in the Hub's answer is none ({str(name)[:60]!r}); check HF_ENDPOINT")
    return str(name)


def _whole(path: Path, size: int | None, store: Path) -> bool:
    """Whether a file of a snapshot is there with its size. One that is cut off is removed with what it links to: the
    Hub's library takes any file that is there for a whole one."""
    if path.exists() and size in (None, path.stat().st_size):
        return True
    forget(path, store)
    return False


def forget(path: Path, store: Path | None = None) -> None:
    """Remove a file of the Hub's cache and what it links to, as far as these lie in the cache."""
    if store is None:
        from huggingface_hub import constants

        store = Path(constants.HF_HUB_CACHE)
    for _ in range(5):  # a snapshot's link, a blob, a blob that repositories share
        if not path.parent.resolve().is_relative_to(store.resolve()):
            return
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target


def _room(what: str, need: int, store: Path) -> None:
    store.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store).free
    if need > free:
        raise UserError(
            f"{what} needs {need / 2**30:.0f} GiB more and {store} has {free / 2**30:.0f} GiB free; "
            "free some, or set SUITE_CACHE to a larger place"
        )


def _quiet() -> None:
    """A bar's carriage returns fill a log."""
    if not sys.stderr.isatty():
        from datasets import disable_progress_bars as datasets_bars
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        datasets_bars()


@contextmanager
def _sentences(what: str) -> Iterator[None]:
    """One sentence for whatever the Hub or its libraries raise: their errors have no base in common."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise _sentence(what, e) from e


def _sentence(what: str, e: BaseException) -> UserError:
    codes = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes(e)}
    if codes & {401, 403} or any(type(cause).__name__ == "GatedRepoError" for cause in causes(e)):
        return UserError(
            f"{what}: access is refused; check the id, accept its licence on the Hub, and log in with "
            "`.venv/bin/hf auth login`"
        )
    if refused := next((cause for cause in causes(e) if isinstance(cause, PermissionError)), None):
        return UserError(
            f"{what}: {refused.filename} belongs to somebody else; ask them to run this, or set SUITE_CACHE"
        )
    if full := next((c for c in causes(e) if isinstance(c, OSError) and c.errno in FULL), None):
        return UserError(f"{what}: {full.strerror} in HF_HOME; free some, or set SUITE_CACHE to a larger place")
    if 404 in codes:
        return UserError(f"{what}: there is no such thing on the Hub; check the id and the revision in the config")
    if any("OfflineModeIsEnabled" in f"{type(cause).__name__}: {cause}" for cause in causes(e)):
        return UserError(f"{what} cannot be fetched offline; unset HF_HUB_OFFLINE and run `make fetch` again")
    if type(e) is ValueError:  # datasets: no such split, no such configuration
        return UserError(f"{what}: {' '.join(str(e).split())[:160]}; check the config")
    answers = {code for code in codes if code is not None}
    why = f"the Hub answered {max(answers)}" if answers else f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
    return UserError(f"{what} cannot be fetched ({why}); run `make fetch` again, on a node with a network")


def _patiently(call: Callable[[], T]) -> T:
    """The Hub's library does not wait by itself when a question, not a file, is answered with 'too many' or 'down'."""
    for wait in (1, 3, 9):
        try:
            return call()
        except Exception as e:
            if getattr(getattr(e, "response", None), "status_code", 0) not in (429, 500, 502, 503, 504):
                raise
            time.sleep(wait)
    return call()


def causes(e: BaseException | None) -> Iterator[BaseException]:
    while e is not None:
        yield e
        e = e.__cause__ or e.__context__
