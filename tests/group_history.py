"""Everything a consumer group has ever committed, in the broker's own order: read from ``__consumer_offsets``.

Sampling the committed offset every so often can miss a commit that was wrong for a moment. The broker's own log of
commits misses none: which offset, and when by the broker's clock, which also stamps the responses
(``message.timestamp.type=LogAppendTime``). The layout is Kafka's (``OffsetCommitKey.json``, ``OffsetCommitValue.json``,
``GroupMetadataKey.json``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from brokers import Broker
from ledger import Answer, Reader
from protocol import Fields, ask, string

OFFSETS_TOPIC = "__consumer_offsets"

LEAVE_GROUP, DESCRIBE_GROUPS = 13, 15


@dataclass(frozen=True)
class Commit:
    """One accepted commit of one partition."""

    partition: int
    offset: int
    at: int
    """Milliseconds since the epoch, by the broker's clock."""
    metadata: str = ""


@dataclass
class GroupHistory:
    """What the broker has written down about one group, oldest first."""

    commits: list[Commit] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    """When the group's membership was written: at the end of each rebalance."""


def parse(records: Iterable[Answer], group: str, topic: str) -> GroupHistory:
    """Pick what concerns *group* and *topic* out of the records of the offsets topic.

    Raises:
        ValueError: a record is of a version this reader does not know.
    """
    history = GroupHistory()
    for record in records:
        key = Fields(record.key or b"")
        kind = key.number("h")
        if kind > 2 or key.string() != group:
            continue  # above 2: groups of other protocols
        if kind == 2:
            history.generations.append(record.timestamp)
        elif key.string() == topic and record.value is not None:  # None: the offset has been deleted
            history.commits.append(_commit(key.number("i"), Fields(record.value)))
    return history


def _commit(partition: int, value: Fields) -> Commit:
    version = value.number("h")
    if version not in {3, 4}:
        raise ValueError(f"a commit of version {version}: this reader knows 3 and 4")
    offset = value.number("q")
    value.number("i")  # leader epoch
    metadata = value.compact_string() if version == 4 else value.string()
    return Commit(partition, offset, value.number("q"), metadata)


def read_history(broker: Broker, group: str, topic: str) -> GroupHistory:
    """Read what the group has committed so far; of transactions only those that were committed."""
    reader = Reader(broker, OFFSETS_TOPIC, isolation="read_committed")
    try:
        return parse(reader.read_to_end(), group, topic)
    finally:
        reader.close()


def bury(broker: Broker, group: str, client_id: str) -> bool:
    """End the membership of a dead process, as the end of its session would; True where it was a member.

    What the process itself would have sent on leaving, sent by somebody else, in Kafka's own words: an administration
    client that has seen its broker go and come may not find the group's coordinator for a long time. Only where the
    broker is one node: it is not looked for who coordinates the group.

    Raises:
        OSError: the broker is not there.
    """
    dead = [member for member, client in _members(broker, group) if client == client_id]
    for member in dead:
        answer = ask(broker.bootstrap, LEAVE_GROUP, 1, string(group) + string(member))
        answer.number("i")  # throttle time
        error = answer.number("h")
        assert error in {0, 25}, f"the broker refused to bury a member: error {error}"  # 25: it was gone already
    return bool(dead)


def _members(broker: Broker, group: str) -> list[tuple[str, str]]:
    """Member id and client id of everybody in the group."""
    answer = ask(broker.bootstrap, DESCRIBE_GROUPS, 0, struct.pack(">i", 1) + string(group))
    assert answer.number("i") == 1
    answer.number("h")  # error
    for _ in ("group", "state", "protocol type", "protocol"):
        answer.string()
    members = []
    for _ in range(answer.number("i")):
        members.append((answer.string(), answer.string()))
        answer.string()  # host
        for _ in ("metadata", "assignment"):
            answer.skip(answer.number("i"))
    return members
