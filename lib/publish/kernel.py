"""Publishing a cell: its repositories one after another, each looked at, sent as far as it differs, looked at again."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.base.errors import UserError
from lib.base.turns import one_at_a_time
from lib.publish.contents import Contents
from lib.publish.experiment import Item, Publish
from lib.publish.files import File
from lib.publish.ledger import HUB, ledger_of
from lib.run.command import Job
from lib.run.lifecycle import heed_signals
from lib.run.rows import Columns
from lib.run.task import run_rows, task_of
from lib.store import Cell
from lib.store.markers import Facts, sweep

if TYPE_CHECKING:
    from lib.publish.hub import Hub


def compute(this: Job) -> int:
    experiment = this.of(Publish)
    with heed_signals("repository") as notice:
        return _compute(this, experiment, lambda: notice.came)


def _compute(this: Job, experiment: Publish, warned: Callable[[], bool]) -> int:
    def load(cell: Cell) -> tuple["PublishKernel", Mapping[str, Any]]:
        found = this.keep("hub", "", lambda: login(this, experiment, warned))
        if isinstance(found, UserError):
            raise found
        hub, owner = found
        return PublishKernel(this, hub, Contents(experiment, this.site.cache, cell, owner)), {}

    return run_rows(this, load, sampled=True)


def login(this: Job, experiment: Publish, warned: Callable[[], bool]) -> "tuple[Hub, str] | UserError":
    """The Hub, and who owns what is made there. An error is kept too: the next cell's would be the same."""
    os.environ.setdefault(
        "HF_HUB_DISABLE_XET", "1"
    )  # plain requests, which are counted and, where they break, repeated
    scratch, run = this.site.scratch, experiment.run
    sweep(scratch / HUB)
    try:
        from lib.publish.hub import Hub  # reads HF_* when it is imported

        hub = Hub(run, run.wait_minutes, lambda user: ledger_of(scratch, user), warned)
        owner = hub.open(experiment.owner)
    except UserError as e:
        return e
    print(experiment.plan(this.site.cache, scratch, task_of(this), owner).text(), flush=True)
    return hub, owner


@dataclass(frozen=True)
class Prepared:
    item: Item
    id: str
    files: list[File]


@dataclass
class PublishKernel:
    """A kernel of rows: one repository each."""

    this: Job
    hub: "Hub"
    contents: Contents

    def prepare(self, start: int, stop: int) -> Prepared:
        [item] = self.contents.experiment.items()[start:stop]
        return Prepared(item, self.contents.id(item), self.contents.files(item))

    def compute(self, prepared: Prepared) -> tuple[Columns, Facts]:
        e, hub, item = self.contents.experiment, self.hub, prepared.item
        before, owner = hub.calls, self.contents.owner
        message = f"{self.contents.cell.name}, run {e.run_number}: {item.what} {self.contents.cell.digest[:16]}"
        lock = self.this.site.scratch / HUB / f"{item.type}-{prepared.id.partition('/')[2]}.lock"
        with one_at_a_time(lock, f"{item.type} {prepared.id}", hub.wait):  # a copy of this task would send it, too
            sent = hub.publish(item.type, prepared.id, e.private, prepared.files, message)
        title = e.collection(item, owner)
        record = self.this.site.scratch / HUB / f"{owner}-{e.label}-{item.type}s.json"
        hub.collect(title, owner, e.private, record, item.type, prepared.id)
        size = sum(file.size for file in prepared.files)
        print(f"{item.type} {prepared.id}: {sent.outcome}, {sent.bytes:,} of {size:,} bytes sent", flush=True)
        columns: Columns = {
            "repository": [f"{item.type}:{prepared.id}"],
            "commit": [sent.commit],
            "outcome": [sent.outcome],
            "files": np.array([sent.files], np.int32),
            "bytes": np.array([size]),
            "sent": np.array([sent.bytes]),
        }
        said = {"new_repositories": sent.outcome == "new", "commits": sent.outcome != "as it was"}
        said |= {"bytes_sent": sent.bytes, "calls": hub.calls - before}
        return columns, {name: int(value) for name, value in said.items()}
