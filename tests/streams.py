"""Streams and events of several devices without any: every copy of a link's buffers, with what is known to come before
it. Two of them that meet in a buffer, one writing, and are not in an order by streams and events, are a race."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lib.lora import stages

Clock = dict["Stream", int]


class Stream:
    def __init__(self) -> None:
        self.clock: Clock = {self: 0}

    def wait_event(self, event: "Event") -> None:
        for stream, time in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)


class Event:
    def __init__(self) -> None:
        self.clock: Clock = {}  # never recorded: waited for by nobody

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


class Watch:
    """In place of torch's own, for the links of some stages."""

    def __init__(self, monkeypatch, pipe: stages.Stages) -> None:
        self.races: list[str] = []
        self.crossed = 0
        self.seen: dict[int, list[tuple[Stream, int, bool]]] = {}
        self.here: list[Stream] = []  # the device that is on
        self.side: list[Stream] = []  # streams that stand in for the devices' own
        links = [*pipe.onwards, *pipe.back]
        computes = [Stream() for _ in pipe.steps]
        for i, (onwards, back) in enumerate(zip(pipe.onwards, pipe.back, strict=True)):
            ends = ((onwards, computes[i], computes[i + 1]), (back, computes[i + 1], computes[i]))
            for link, source, target in ends:
                link.real, link.source, link.target = True, source, target
                link.out, link.back, link.packed, link.copied = Stream(), Stream(), Event(), Event()
                link.arrived = [Event() for _ in link.came]
        buffers = {one.data_ptr() for link in links for one in (link.sent_MD, *link.came)}
        real = torch.Tensor.copy_

        def copy(target, source, non_blocking=False):
            parts = [(one.data_ptr(), write) for one, write in ((target, True), (source, False))]
            if found := [part for part in parts if part[0] in buffers]:
                self._copy(found, crosses=len(found) == 2)
            return real(target, source, non_blocking)

        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.here[-1])
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self._inside(self.side, stream))
        monkeypatch.setattr(stages, "on", lambda device: self._inside(self.here, device))

    @contextmanager
    def _inside(self, where: list, what: object) -> Iterator[None]:
        where.append(what)
        yield
        where.pop()

    def _copy(self, parts: list[tuple[int, bool]], crosses: bool) -> None:
        """From one device to another as torch does it: the target's stream is waited for, and waits."""
        stream = self.here[-1] if not crosses else self.side[-1]
        other, event = self.side[0] if crosses else stream, Event()
        event.record(other)
        stream.wait_event(event)
        stream.clock[stream] += 1
        for buffer, writes in parts:
            for before, time, wrote in self.seen.setdefault(buffer, []):
                if (wrote or writes) and stream.clock.get(before, 0) < time:
                    self.races.append(f"{wrote=} {writes=}")
            self.seen[buffer].append((stream, stream.clock[stream], writes))
        event.record(stream)
        other.wait_event(event)
        self.crossed += crosses
