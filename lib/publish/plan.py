"""What publishing will ask of the Hub, said before anything is sent."""

import math
from dataclasses import dataclass
from typing import Protocol


class Limits(Protocol):
    @property
    def new_repositories(self) -> int: ...

    @property
    def repos_a_day(self) -> int: ...

    @property
    def share(self) -> str: ...

    @property
    def commits_an_hour(self) -> int: ...

    @property
    def calls(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    ids: list[str]  # repositories that are not known to be as they should
    calls: int  # at most, as are the commits and the bytes
    bytes: int
    largest: int
    spent: int  # new repositories in the last 24 hours
    run: Limits

    @property
    def days(self) -> int:
        """On which repositories are made, were all of them new."""
        return math.ceil((len(self.ids) + self.spent) / self.run.new_repositories)

    def text(self) -> str:
        if not self.ids:
            return "to publish: nothing"
        count, run = len(self.ids), self.run
        things = f"{count:,} repositories" if count > 1 else "1 repository"
        part = "" if run.share == "1" else f" (share {run.share} of {run.repos_a_day})"
        hours = max(count / run.commits_an_hour, self.calls / run.calls / 12)
        many = f" ... {self.ids[-1]}" if count > 1 else ""
        return (
            f"to publish: {things}, {self.ids[0]}{many}\n"
            f"at most {count:,} commit{'s' * (count > 1)}, {self.calls:,} calls, about {self.bytes / 1e6:,.3g} MB "
            f"(the largest {self.largest / 1e6:,.3g} MB)\n"
            f"new repositories: {run.new_repositories} a day here{part}, {self.spent} made in the last 24 hours: "
            f"{self.days} {'day' if self.days == 1 else 'days'}\n"
            f"commits: {run.commits_an_hour} an hour, calls: {run.calls} in 5 minutes: {hours:.2g} h at least"
        )
