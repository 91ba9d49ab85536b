"""Whose turn it is, in a kind whose jobs have lanes: how many may be claimed, of which lanes, from where on.

One lane with ten thousand jobs, or one receiver that never answers, must not hold up everybody else's one job. So a process goes
round the lanes, and holds at most ``lane_places`` jobs of a lane and ``group_places`` of a group (``GROUP/…``) at any time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from portico.kit.queue import Limits, Turn, Work


def group_of(lane: str) -> str:
    """``org_1`` of ``org_1/chn_1``."""
    return lane.partition("/")[0]


class Turns:
    """The place of one process in the round."""

    def __init__(self, column: str, limits: Limits) -> None:
        self._column, self._limits, self._after = column, limits, ""

    def next(self, held: Iterable[Work], free: int) -> tuple[int, Turn]:
        """How many jobs to claim, and of what. No lane and no group comes over its places by it, wherever the jobs are from."""
        lanes = Counter(str(work.row[self._column]) for work in held)
        groups: Counter[str] = Counter()
        for lane, count in lanes.items():
            groups[group_of(lane)] += count
        full_lanes = [lane for lane, count in lanes.items() if count >= self._limits.lane_places]
        full_groups = [group for group, count in groups.items() if count >= self._limits.group_places]
        most = max((count for lane, count in lanes.items() if lane not in full_lanes), default=0)
        most_of_group = max((count for group, count in groups.items() if group not in full_groups), default=0)
        count = min(free, self._limits.group_places - most_of_group)
        return count, Turn(self._after, min(count, self._limits.lane_places - most), full_lanes, full_groups)

    def taken(self, found: Sequence[Work], asked: int) -> bool:
        """Go on behind the last lane that was taken from; at the end of the round to its beginning. Whether to look at once."""
        began = self._after
        if len(found) >= asked:
            self._after = max(str(work.row[self._column]) for work in found)
            return True
        self._after = ""
        return began != ""
