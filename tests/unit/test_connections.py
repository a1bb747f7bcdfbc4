"""What the client is told when a connection has ended beneath it, or leads to no broker."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import IncompatibleBrokerVersion, KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest

from consumer.kafka import clients, expansion, frames
from consumer.kafka.clients import NotAKafkaAnswer
from consumer.kafka.topic_ids import TopicIdsRequest
from consumer.kafka.transaction_states import TransactionStateRequest


async def ended_connection() -> AIOKafkaConnection:
    """A connection whose transport is closed, which the client has not noticed yet."""
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    _, writer = await asyncio.open_connection(host, port)
    writer.transport.abort()
    await asyncio.sleep(0.01)
    server.close()
    connection = AIOKafkaConnection(host, port)
    connection._writer = writer
    connection._versions = {MetadataRequest.API_KEY: (0, 5)}
    return connection


def test_a_connection_that_has_ended_is_a_broken_connection_whatever_the_loop_says() -> None:
    """Contract 11: an outage of the brokers ends nothing; of a RuntimeError the client's own tasks would die."""

    async def scenario() -> None:
        with pytest.raises(RuntimeError):
            clients._send(await ended_connection(), MetadataRequest([]))
        connection = await ended_connection()
        with pytest.raises(KafkaConnectionError):
            connection.send(MetadataRequest([]))
        assert not connection.connected()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


async def test_what_the_broker_does_not_speak_is_told_as_such() -> None:
    """Contract 5: brokers without topic ids, or states of transactions, are worked with; their connections stay."""
    connection = AIOKafkaConnection("127.0.0.1", 9)
    connection._writer = writer = object()  # which is not written to
    connection._versions = {TopicIdsRequest.API_KEY: (0, 11)}

    with pytest.raises(NotImplementedError):
        connection.send(TopicIdsRequest(["operations"]))
    with pytest.raises(IncompatibleBrokerVersion):
        connection.send(TransactionStateRequest("group/operations/3"))

    assert connection._writer is writer


async def answered(head: bytes) -> KafkaConnectionError:
    """Connect to a server that answers the first request with *head* and nothing more; return how that fails."""
    done = asyncio.Event()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        writer.write(head)
        await done.wait()
        writer.close()

    async with await asyncio.start_server(meet, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        connection = AIOKafkaConnection(host, port, request_timeout_ms=300)
        with pytest.raises((KafkaConnectionError, TimeoutError)) as failure:
            await connection.connect()
        done.set()
        await asyncio.wait([connection.close()])
    assert isinstance(failure.value, KafkaConnectionError), "it has waited for the rest"
    return failure.value


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 400 Bad Request\r\n", b"\x15\x03\x03\x00\x02\x02\x28", b"SSH-2.0-OpenSSH\r\n", b"\x10\x00\x00\x01"],
    ids=["HTTP", "TLS alert", "SSH", "one byte too long"],
)
async def test_an_answer_that_no_broker_gives_ends_the_connection_at_once(head: bytes) -> None:
    """H36: its first four bytes would be waited for, and kept, as far as they come."""
    error = await answered(head)

    assert isinstance(error.__cause__, NotAKafkaAnswer)
    assert ("TLS" in str(error.__cause__)) == (head[0] == 0x15)


async def test_an_answer_that_is_as_long_as_may_be_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where records may be larger, answers may be so, too."""
    with pytest.raises(AssertionError, match="waited for the rest"):
        await answered(b"\x10\x00\x00\x00")
    buffer = expansion._Buffer()
    buffer.size = 2 * frames.FRAME_BYTES_MAX
    monkeypatch.setattr(expansion, "_buffer", buffer)
    with pytest.raises(AssertionError, match="waited for the rest"):
        await answered(b"\x20\x00\x00\x00")
