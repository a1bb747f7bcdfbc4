"""What a group has committed, seen and changed from outside: its offset maps, and where it goes on.

Changes are made while the group has no members: one that runs would go on from where it is, and its next commit would
undo them. That is asked first, to say so in words, and the broker refuses them otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from consumer.config import Config
from consumer.kafka.ranges import Position, offsets_at
from consumer.kafka.tools import existing
from consumer.kafka.topics import EARLIEST, LATEST, Cluster, ClusterRefusal, Committed, Partition
from consumer.offset_map import OffsetMap, decode

_NO_MEMBERS: Final = frozenset({"Empty", "Dead"})


class GroupNotEmpty(ClusterRefusal):
    """The group has members."""

    hint = "stop all of them; after a kill the broker waits for the session time-out (kafka.session_timeout)"


@dataclass(frozen=True, slots=True)
class Stored:
    """One commit, and what its metadata says."""

    topic: str
    partition: int
    offset: int
    metadata: str
    map: OffsetMap


@dataclass(frozen=True, slots=True)
class Move:
    """Another place for a group in one partition."""

    topic: str
    partition: int
    committed: int | None
    """Where it was; None where it had committed nothing."""
    offset: int
    """Where it goes on."""
    asked: int
    """What was asked for; the log may begin after it or end before it."""


async def stored_maps(config: Config) -> list[Stored]:
    """Return every commit of ``kafka.group_id``, ordered, each with its map as the service would read it.

    Raises:
        ClusterUnavailable: no answer in time.
        ClusterRefusal: not authorised.
    """
    async with Cluster(config) as cluster:
        return await _stored(cluster, config.kafka.group_id)


async def clear_maps(config: Config, *, dry_run: bool) -> list[Stored]:
    """Commit the same offsets without their maps, so that what is finished above them runs again.

    Metadata that is no map stays.

    Returns:
        The maps that were there.

    Raises:
        GroupNotEmpty: as it says.
        ClusterUnavailable, ClusterRefusal: as :func:`stored_maps`.
    """
    group = config.kafka.group_id
    async with Cluster(config) as cluster:
        await _require_empty(cluster, group)
        found = [stored for stored in await _stored(cluster, group) if stored.map.reason not in {"absent", "foreign"}]
        if found and not dry_run:
            await cluster.commit(
                group, {(stored.topic, stored.partition): Committed(stored.offset, "") for stored in found}
            )
    return found


async def plan_reset(config: Config, position: Position) -> list[Move]:
    """Find where *position* is in every partition of the input topics, ordered; an offset is kept within the log.

    Raises:
        GroupNotEmpty: as it says.
        ClusterUnavailable: no answer in time.
        ClusterRefusal: an input topic does not exist, or not authorised.
    """
    group = config.kafka.group_id
    async with Cluster(config) as cluster:
        await _require_empty(cluster, group)
        topics = [await existing(cluster, name) for name in sorted(config.input.topics)]
        places = [(topic.name, number) for topic in topics for number in sorted(topic.leaders)]
        committed = await cluster.committed(group, places)
        asked = await offsets_at(cluster, places, position)
        first, end = await cluster.offsets(places, EARLIEST), await cluster.offsets(places, LATEST)
    return [
        Move(
            *place,
            committed=committed[place].offset if place in committed else None,
            offset=min(max(asked[place], first[place]), end[place]),
            asked=asked[place],
        )
        for place in places
    ]


async def reset(config: Config, moves: list[Move]) -> None:
    """Commit the offsets of *moves*, without maps.

    Raises:
        GroupNotEmpty, ClusterUnavailable, ClusterRefusal: as :func:`plan_reset`.
    """
    async with Cluster(config) as cluster:
        await _require_empty(cluster, config.kafka.group_id)
        commits = {(move.topic, move.partition): Committed(move.offset, "") for move in moves}
        await cluster.commit(config.kafka.group_id, commits)


async def _require_empty(cluster: Cluster, group: str) -> None:
    state = await cluster.group(group)
    if state.members or state.state not in _NO_MEMBERS:
        raise GroupNotEmpty(f"group {group} is not empty: {state.state}, {state.members} members")


async def _stored(cluster: Cluster, group: str) -> list[Stored]:
    commits = await cluster.committed(group)
    ends = await _ends(cluster, commits)
    identity = await cluster.cluster_id() or ""
    return [
        Stored(
            *place,
            offset=commit.offset,
            metadata=commit.metadata,
            map=decode(
                commit.metadata, committed_offset=commit.offset, cluster_id=identity, end=ends.get(place)
            ),
        )
        for place, commit in sorted(commits.items())
    ]


async def _ends(cluster: Cluster, commits: Mapping[Partition, Committed]) -> dict[Partition, int]:
    """Return the log's end where there is a map to compare with it, and a partition that is led."""
    with_map = [place for place, commit in commits.items() if commit.metadata]
    topics = await cluster.topics({topic for topic, _ in with_map})
    led = [
        (name, partition)
        for name, partition in with_map
        if (topic := topics[name]) is not None and topic.leaders.get(partition, -1) >= 0
    ]
    return await cluster.offsets(led, LATEST) if led else {}
