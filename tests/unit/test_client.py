"""The client for Python services, over a channel that answers as it is told; e2e/test_client.py has the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from traceback import walk_tb
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from consumer.client import PENDING_MAX, TierstreamClient, response_of
from consumer.codec import OperationDecoder, ResponseEncoder
from consumer.errors import (
    STATUS_BY_CODE,
    BackendUnavailable,
    InvalidOperation,
    OperationDropped,
    OperationPanic,
    OperationTimeout,
    TierstreamError,
    TooLarge,
    UnexpectedTombstone,
)
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.kafka.tools import Outgoing
from consumer.kafka.topics import ClusterRefusal
from consumer.operations import (
    Deleted,
    Got,
    Headed,
    Inserted,
    Metadata,
    OpResponse,
    PayloadReference,
    StoredObject,
    TimeToLive,
)

CONTEXT = ObjectContext("photos", [Scope("org", "17")])
Answer = Callable[[Any], OpResponse | Exception | None]


class ChannelDouble:
    """Answers each operation by a function; what it returns None for is not answered."""

    def __init__(self, answer: Answer = lambda _: None) -> None:
        self.answer = answer
        self.sent: list[Outgoing] = []
        self.incoming: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.started = self.stopped = 0
        self._progress = asyncio.Condition()
        self.start_error: Exception | None = None
        self.send_error: Exception | None = None
        self._encoder = ResponseEncoder("operations", 3)
        self._decoder = OperationDecoder()

    async def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error
        self.started += 1

    async def send(self, record: Outgoing) -> None:
        async with self._progress:
            self.sent.append(record)
            self._progress.notify_all()
        if self.send_error is not None:
            raise self.send_error
        decoded = self._decoder.decode(record.value)
        outcome = self.answer(decoded.operation)
        if outcome is not None:
            _, value = self._encoder.encode(len(self.sent), decoded, outcome, 1)
            self.incoming.put_nowait(value)

    async def sent_so_many(self, count: int) -> None:
        """Wait until so many operations have been sent."""
        async with self._progress:
            await self._progress.wait_for(lambda: len(self.sent) >= count)

    async def received(self) -> AsyncIterator[Any]:
        while True:
            value = await self.incoming.get()
            if isinstance(value, Exception):
                raise value
            yield SimpleNamespace(value=value, partition=3, offset=0)

    async def stop(self) -> None:
        self.stopped += 1


def client(channel: ChannelDouble, timeout: float = 10.0) -> TierstreamClient:
    """A client on a channel."""
    return TierstreamClient("unused:1", channel=channel, timeout=timeout)


async def test_each_operation_gets_its_own_answer() -> None:
    """What the service answers comes back as the Python API has it."""
    metadata = Metadata(content_type="text/plain", expiration=TimeToLive(60), custom={"a": "b"}, size=5)
    answers: dict[str, OpResponse] = {
        "insert": Inserted(ObjectId(CONTEXT, "k"), metadata),
        "get": Got("k", StoredObject(metadata, b"hello")),
        "head": Headed("k", metadata),
        "delete": Deleted("k"),
    }
    channel = ChannelDouble(lambda operation: answers[operation.kind])

    async with client(channel) as ours:
        assert await ours.insert(CONTEXT, "k", b"hello", metadata) == answers["insert"]
        assert await ours.get(CONTEXT, "k") == StoredObject(metadata, b"hello")
        assert await ours.head(CONTEXT, "k") == metadata
        await ours.delete(CONTEXT, "k")

    assert {record.key for record in channel.sent} == {b"photos/org.17/objects/k"}
    assert (channel.started, channel.stopped) == (1, 1)


async def test_a_missing_object_is_none_and_a_large_one_a_reference() -> None:
    """Contract 2.2 and 5."""
    reference = PayloadReference("gs://b/n", 3_000_000, 7)
    found: list[OpResponse] = [Got("k", None), Headed("k", None), Got("k", StoredObject(Metadata(), reference))]
    channel = ChannelDouble(lambda _: found.pop(0))

    async with client(channel) as ours:
        assert await ours.get(CONTEXT, "k") is None
        assert await ours.head(CONTEXT, "k") is None
        large = await ours.get(CONTEXT, "k")

    assert large is not None
    assert large.payload == reference


async def test_a_keyless_insert_learns_its_key_and_has_no_record_key() -> None:
    """The service generates it."""
    channel = ChannelDouble(lambda _: Inserted(ObjectId(CONTEXT, "made"), Metadata()))

    async with client(channel) as ours:
        assert (await ours.insert(CONTEXT, None, b"x")).key == "made"

    assert channel.sent[0].key is None


async def test_a_thousand_calls_at_once_are_answered_each_by_its_own() -> None:
    """Answers come in any order; a call finds its own by request id."""
    channel = ChannelDouble()
    async with client(channel) as ours:
        calls = [asyncio.create_task(ours.get(CONTEXT, f"k{number}")) for number in range(PENDING_MAX)]
        await channel.sent_so_many(PENDING_MAX)
        for record in reversed(channel.sent):
            channel.answer = lambda operation: Got(operation.key, StoredObject(Metadata(), operation.key.encode()))
            await channel.send(record)
        found = await asyncio.gather(*calls)

    assert [one.payload for one in found if one] == [f"k{number}".encode() for number in range(PENDING_MAX)]


async def test_responses_of_others_repeats_and_noise_are_dropped() -> None:
    """The response topic belongs to everybody."""
    channel = ChannelDouble(lambda operation: Deleted(operation.key))
    channel.incoming.put_nowait(b"no response at all")
    async with client(channel) as ours:
        await ours.delete(CONTEXT, "k")
        await channel.send(channel.sent[0])  # answered again, when nobody waits any more
        await ours.delete(CONTEXT, "k")


@pytest.mark.parametrize("code", sorted(set(STATUS_BY_CODE) - {"at_capacity", "config_error"}))
async def test_a_failure_is_raised_as_the_error_of_its_code(code: str) -> None:
    """Every code of contract 2.2 has its class; its retriability comes along."""
    channel = ChannelDouble(lambda _: TierstreamError("said so", code=code))

    async with client(channel) as ours:
        with pytest.raises(TierstreamError, match="said so") as caught:
            await ours.get(CONTEXT, "k")

    assert type(caught.value) is not TierstreamError
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("code", "kind", "retriable"),
    [("backend_unavailable", BackendUnavailable, True), ("unexpected_tombstone", UnexpectedTombstone, False)],
)
def test_whether_to_try_again_is_told_by_the_class(code: str, kind: type[TierstreamError], retriable: bool) -> None:
    """As everywhere in the Python API."""
    fields = {"key": "k", "result": {"type": "Failure", "code": code, "message": "m", "retriable": retriable}}

    with pytest.raises(kind) as caught:
        response_of(CONTEXT, fields)

    assert caught.value.retriable is retriable


async def test_no_response_in_time_says_that_the_outcome_is_unknown() -> None:
    """And nothing of the call stays behind."""
    async with client(ChannelDouble(), timeout=0.01) as ours:
        with pytest.raises(OperationTimeout, match="may have taken effect"):
            await ours.delete(CONTEXT, "k")

        assert not ours._pending


async def test_what_breaks_a_rule_is_not_sent() -> None:
    """The record would only be answered as poison."""
    channel = ChannelDouble()
    async with client(channel) as ours:
        with pytest.raises(InvalidOperation):
            await ours.get(CONTEXT, "")

    assert not channel.sent


async def test_a_delivery_that_fails_is_raised_and_forgotten() -> None:
    """No response can come."""
    channel = ChannelDouble()
    channel.send_error = TooLarge("too large for the topic")
    async with client(channel) as ours:
        with pytest.raises(TooLarge):
            await ours.insert(CONTEXT, "k", b"x")

        assert not ours._pending


async def test_a_stop_ends_calls_that_wait() -> None:
    """Their outcome is unknown, and they are told."""
    channel = ChannelDouble()
    ours = client(channel)
    await ours.start()
    call = asyncio.create_task(ours.get(CONTEXT, "k"))
    await channel.sent_so_many(1)

    await ours.stop()
    await ours.stop()

    with pytest.raises(OperationDropped):
        await call


async def test_responses_that_cannot_be_read_end_every_call_with_the_reason() -> None:
    """Waiting for the deadline would hide it."""
    channel = ChannelDouble()
    async with client(channel) as ours:
        call = asyncio.create_task(ours.get(CONTEXT, "k"))
        await channel.sent_so_many(1)
        channel.incoming.put_nowait(ClusterRefusal("cannot read"))
        with pytest.raises(ClusterRefusal):
            await call
        with pytest.raises(ClusterRefusal):
            await ours.get(CONTEXT, "k")


async def test_a_reader_that_breaks_is_no_silence() -> None:
    """A defect in it is told to whoever waits, not found out by every deadline."""
    channel = ChannelDouble()
    async with client(channel) as ours:
        call = asyncio.create_task(ours.get(CONTEXT, "k"))
        await channel.sent_so_many(1)
        channel.incoming.put_nowait(ZeroDivisionError("defect"))
        with pytest.raises(OperationPanic, match="ZeroDivisionError: defect"):
            await call


async def test_calls_after_the_end_of_the_reader_are_not_kept_by_its_error() -> None:
    """One error that is raised again and again keeps every frame that it came through, and the payload in each."""
    channel = ChannelDouble()

    async def failing(ours: TierstreamClient) -> list[FrameType]:
        with pytest.raises(OperationPanic) as caught:
            await ours.insert(CONTEXT, "k", b"x")
        return [frame for frame, _ in walk_tb(caught.value.__traceback__)]

    async with client(channel) as ours:
        calls = [asyncio.create_task(failing(ours)) for _ in range(5)]
        await channel.sent_so_many(5)
        channel.incoming.put_nowait(ZeroDivisionError("defect"))
        waiting = await asyncio.gather(*calls)
        later = [await failing(ours) for _ in range(5)]

    assert len({len(frames) for frames in waiting}) == 1, "those that waited are not in each other's"
    assert len({len(frames) for frames in later}) == 1
    assert all(frame.f_code.co_name != "_read" for frames in later for frame in frames)


async def test_a_start_that_fails_leaves_nothing_connected() -> None:
    """Whoever retries starts anew."""
    channel = ChannelDouble()
    channel.start_error = ClusterRefusal("there is no topic operations")

    with pytest.raises(ClusterRefusal):
        await client(channel).start()

    assert channel.stopped == 1


async def test_a_call_before_the_start_is_a_mistake_of_the_program() -> None:
    """Said at once."""
    with pytest.raises(RuntimeError, match="start the client"):
        await client(ChannelDouble()).get(CONTEXT, "k")



async def test_within_a_span_the_operation_carries_its_context() -> None:
    """So that the service's spans continue the caller's trace; without a span there is nothing to carry."""
    from opentelemetry.sdk.trace import TracerProvider

    channel = ChannelDouble(lambda operation: Deleted(operation.key))
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("caller")
    async with client(channel) as calls:
        await calls.delete(CONTEXT, "k")
        with tracer.start_as_current_span("work") as span:
            await calls.delete(CONTEXT, "k")

    outside, inside = channel.sent
    context = span.get_span_context()
    assert outside.headers == []
    ((name, value),) = inside.headers
    assert name == "traceparent"
    assert (value or b"").startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-".encode())
