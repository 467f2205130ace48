"""Where a set's rows come from: a Hub dataset at one commit, or a local folder or file with the same layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.base.atomic import write_json
from lib.base.errors import UserError
from lib.inputs.hub import Row, dataset_commit, dataset_stream
from lib.inputs.kept import kept_or_made
from lib.inputs.records import local_path, read_record, slug
from lib.inputs.samples import tree_stamp
from lib.inputs.specs import SourceSpec

Shuffle = tuple[int, int] | None  # seed, documents that the buffer holds
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Resolved:
    """What a branch or a tag stood for when it was asked."""

    id: str
    revision: str
    commit: str


@dataclass(frozen=True)
class Source:
    spec: SourceSpec
    path: Path | None  # None: on the Hub
    commit: str
    stamp: str  # of a local one

    def rows(self, shuffle: Shuffle = None) -> Iterator[Row]:
        """In file order, or as the shuffled stream gives them."""
        spec = self.spec
        if self.path is None:
            return dataset_stream(spec.id, self.commit, spec.config, spec.split, shuffle)
        return _local_rows(self.path, spec, shuffle)


def find_source(cache: Path, spec: SourceSpec, update: bool = False) -> Source:
    """What a branch like `main` stands for is asked once and recorded, for all sets of this source."""
    path = local_path(cache, spec.id)
    if path:
        stamp = tree_stamp(path)
        if not stamp:
            raise UserError(f"dataset {spec.id}: there is nothing in {path}; check the id in the config")
        return Source(spec, path, "local", stamp)
    folder = cache / "inputs" / "sources" / slug(cache, spec.id, spec.revision)
    record, wanted = folder / "source.json", {"id": spec.id, "revision": spec.revision}

    def kept() -> Resolved | None:
        return None if update else read_record(Resolved, record, wanted)

    known = kept_or_made(folder, f"dataset {spec.id}", kept, lambda: _resolved(record, spec))
    return Source(spec, None, known.commit, "")


def _resolved(path: Path, spec: SourceSpec) -> Resolved:
    found = Resolved(spec.id, spec.revision, dataset_commit(spec.id, spec.revision))
    write_json(path, asdict(found))
    return found


def _local_rows(path: Path, spec: SourceSpec, shuffle: Shuffle) -> Iterator[Row]:
    with _sentences(path):
        from datasets import load_dataset  # takes a second, and reads HF_HOME

        if path.is_dir():
            rows = load_dataset(str(path), spec.config, split=spec.split, streaming=True)
        else:
            reader = next((READERS[part] for part in path.suffixes if part in READERS), None)
            if reader is None:
                raise UserError(f"dataset {path}: wanted a folder, or a file that ends in {', '.join(READERS)}")
            rows = load_dataset(reader, data_files={spec.split: str(path)}, split=spec.split, streaming=True)
        yield from rows.shuffle(seed=shuffle[0], buffer_size=shuffle[1]) if shuffle else rows


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """One sentence for whatever the datasets library and the readers below it raise: they have no base in common."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"dataset {path} cannot be read ({why}); check its files, and config and split") from e
