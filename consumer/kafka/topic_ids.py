"""The ids of topics, which tell a topic from another one that had its name before, and the terms of their leaders.

A topic that is deleted and made anew counts its offsets from 0 again. Whoever compares offsets over time has to know
that, or would take everything new for old. And a partition that has lost its leader and got it back has another *leader
epoch*: who finds the same one twice knows that it was led all the time in between. aiokafka speaks no version of the
metadata request that tells either, so the one that does is written down here, for these purposes alone.

Source: KIP-516, KIP-320; ``MetadataRequest.json`` and ``MetadataResponse.json`` of Apache Kafka, version 12 (brokers
from 3.0).
"""

from __future__ import annotations

from io import BytesIO
from typing import Any
from uuid import UUID

from aiokafka.errors import NoError
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Schema, TaggedFields

_NONE = UUID(int=0)
"""What stands where there is no id."""


class _Uuid(AbstractType[UUID]):
    """Sixteen bytes."""

    @classmethod
    def encode(cls, value: UUID) -> bytes:
        """Write it."""
        return value.bytes

    @classmethod
    def decode(cls, data: BytesIO) -> UUID:
        """Read it."""
        return UUID(bytes=data.read(16))


class _MetadataResponse(Response):
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _MetadataRequest(RequestStruct):
    FLEXIBLE_VERSION = True
    API_KEY = 3
    API_VERSION = 12
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", _Uuid), ("topic", CompactString("utf-8")), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class TopicIdsRequest(Request[_MetadataRequest]):
    """Asks for the ids and leaders of topics, by name.

    Preparing it for a broker that tells none raises what the client raises for every version that a broker does not
    speak: ``NotImplementedError``, which :meth:`consumer.kafka.topics.Cluster.topic_ids` takes for "no ids".
    """

    API_KEY = 3

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def build(self, request_struct_class: type[_MetadataRequest]) -> _MetadataRequest:
        """Make what is sent."""
        return request_struct_class([(_NONE, name, {}) for name in self._names], False, False, {})


def topic_ids(answer: Any) -> dict[str, UUID]:
    """Return the ids in an answer by name, of topics that have one."""
    return {topic["topic"]: topic["topic_id"] for topic in answer.to_object()["topics"] if topic["topic_id"] != _NONE}


def leaders(answer: Any) -> dict[tuple[str, int], tuple[int, int]]:
    """Return who leads each partition in an answer, -1 for nobody, and its epoch; no partition of a topic in error."""
    return {
        (topic["topic"], entry["partition"]): (entry["leader"], entry["leader_epoch"])
        for topic in answer.to_object()["topics"]
        if topic["error_code"] == NoError.errno
        for entry in topic["partitions"]
    }
