"""Places in a topic as people name them: ``earliest``, ``latest``, an offset, or an RFC 3339 time (contract 7)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias

from consumer.kafka.topics import EARLIEST, LATEST, Cluster, Partition

Position: TypeAlias = Literal["earliest", "latest"] | int | datetime
"""A place in any partition; a time stands for the first record of that time or later, the end where there is none."""

OFFSET_MAX: Final = 2**63 - 1

_RFC_3339: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def parse_position(text: str) -> Position:
    """Read a place as the command line has it.

    Raises:
        ValueError: it is none; the text says what one looks like.
    """
    if text == "earliest":
        return "earliest"
    if text == "latest":
        return "latest"
    if text.isascii() and text.isdigit() and int(text) <= OFFSET_MAX:
        return int(text)
    if _RFC_3339.fullmatch(text):
        whole, _, _ = text.partition(".")
        fraction, zone = re.findall(r"(?:\.(\d+))?([Zz]|[+-]\d\d:\d\d)$", text)[0]
        try:
            moment = datetime.fromisoformat(whole[:19].upper() + zone.upper().replace("Z", "+00:00"))
        except ValueError as error:
            raise ValueError(f"{text} is no time: {error}") from None
        return moment + timedelta(microseconds=int((fraction + "000000")[:6]))
    raise ValueError(f"{text} is neither earliest, latest, an offset, nor a time such as 2026-01-31T12:00:00Z")


def milliseconds(moment: datetime) -> int:
    """Return *moment* as Kafka counts time, rounded up, so that no earlier record counts as of that time."""
    return max(0, -((_EPOCH - moment) // timedelta(milliseconds=1)))


async def offsets_at(cluster: Cluster, partitions: Iterable[Partition], position: Position) -> dict[Partition, int]:
    """Return the offset that *position* stands for, in each partition. One given as an offset is returned as it is.

    Raises:
        ClusterUnavailable, ClusterRefusal: as :meth:`~consumer.kafka.topics.Cluster.offsets`.
    """
    if isinstance(position, int):
        return dict.fromkeys(partitions, position)
    if isinstance(position, datetime):
        return await cluster.offsets(partitions, milliseconds(position))
    return await cluster.offsets(partitions, EARLIEST if position == "earliest" else LATEST)
