"""What the client is told when a connection has ended beneath it."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import IncompatibleBrokerVersion, KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest

from consumer.kafka import clients
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
