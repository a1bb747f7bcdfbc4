"""The client for Python services, against a running service on both brokers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from consumer.client import PENDING_MAX, TierstreamClient
from consumer.errors import InvalidMetadata, OperationTimeout
from consumer.ids import ObjectContext
from consumer.kafka.topics import ClusterRefusal, ClusterUnavailable
from consumer.operations import Metadata, TimeToLive
from stages import Stage

CONTEXT = ObjectContext("client")


def make(stage: Stage, *, operations: str = "", responses: str = "", timeout: float = 30.0) -> TierstreamClient:
    """An unstarted client for the topics of a stage, or for others."""
    return TierstreamClient(
        stage.broker.bootstrap,
        operations=operations or stage.config["input"]["topics"][0],
        responses=responses or stage.config["output"]["topic"],
        timeout=timeout,
    )


@pytest.fixture
async def client(stage: Stage) -> AsyncIterator[TierstreamClient]:
    """A started client of the standing service."""
    async with make(stage) as ours:
        yield ours


async def test_an_object_lives_and_dies(client: TierstreamClient) -> None:
    """Every kind of operation, with what storage stamped."""
    key = f"life/{uuid.uuid4()}"
    metadata = Metadata(content_type="text/plain", expiration=TimeToLive(3600), custom={"a": "b"})

    inserted = await client.insert(CONTEXT, key, b"hello", metadata)
    found = await client.get(CONTEXT, key)
    head = await client.head(CONTEXT, key)
    await client.delete(CONTEXT, key)
    gone = await client.get(CONTEXT, key), await client.head(CONTEXT, key)

    assert (inserted.key, inserted.metadata.size) == (key, 5)
    assert found is not None
    assert (found.payload, found.metadata) == (b"hello", inserted.metadata)
    assert head == inserted.metadata
    assert head.time_created is not None
    assert gone == (None, None)


async def test_many_calls_at_once_each_get_their_own(client: TierstreamClient) -> None:
    """More than may be under way at a time; the rest wait for their turn."""
    run = uuid.uuid4()
    count = PENDING_MAX + 200

    await asyncio.gather(*(client.insert(CONTEXT, f"{run}/{number}", b"%d" % number) for number in range(count)))
    found = await asyncio.gather(*(client.get(CONTEXT, f"{run}/{number}") for number in range(count)))

    assert [one.payload for one in found if one is not None] == [b"%d" % number for number in range(count)]


async def test_a_failure_is_raised_as_what_it_is(client: TierstreamClient) -> None:
    """The service checks what the client leaves to it."""
    with pytest.raises(InvalidMetadata, match="compression"):
        await client.insert(CONTEXT, "k", b"x", Metadata(compression="gzip"))


async def test_a_service_that_does_not_answer_is_a_timeout(stage: Stage) -> None:
    """Here: nobody reads the topic."""
    silent = stage.broker.create_topic("silent", 1)
    async with make(stage, operations=silent, timeout=1) as ours:
        with pytest.raises(OperationTimeout):
            await ours.delete(CONTEXT, "k")


@pytest.mark.parametrize("side", ["operations", "responses"])
async def test_a_missing_topic_is_named_at_the_start(stage: Stage, side: str) -> None:
    """Not at the first call's deadline."""
    missing = stage.broker.unused_name("missing")
    ours = make(stage, **{side: missing})  # type: ignore[arg-type]  # one of the two texts

    with pytest.raises(ClusterRefusal, match=missing):
        await ours.start()


async def test_a_broker_that_is_not_there_is_said_in_time() -> None:
    """A start has a deadline of its own."""
    with pytest.raises(ClusterUnavailable):
        await TierstreamClient("127.0.0.1:1").start()
