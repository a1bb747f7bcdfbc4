"""Kafka clients as the service wants them configured, and their start."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError, KafkaError

from consumer.config import Config
from consumer.kafka import expansion, header_names
from consumer.kafka.bootstrap import ask_the_next_address
from consumer.kafka.connection import consumer_settings, producer_settings, reader_settings
from consumer.kafka.fetch_pace import paced
from consumer.kafka.frames import NotAKafkaAnswer
from consumer.kafka.metadata_pace import pace_metadata


def make_consumer(config: Config) -> AIOKafkaConsumer:
    """Make a consumer in the group, without subscription.

    Subscribing before ``start`` would make ``start`` wait for the first assignment without limit (hazard H17).
    """
    return _consumer(config, consumer_settings(config))


def make_reader(config: Config, *, committed_only: bool = True) -> AIOKafkaConsumer:
    """Make a consumer outside any group, for looking at topics."""
    return _consumer(config, reader_settings(config, committed_only=committed_only))


def make_producer(config: Config, batch_bytes: int) -> AIOKafkaProducer:
    """Make an idempotent producer for batches of at most *batch_bytes* before compression."""
    return _producer(producer_settings(config, batch_bytes=batch_bytes))


def make_transactional_producer(config: Config, transactional_id: str) -> AIOKafkaProducer:
    """Make a producer that fences all others of the same *transactional_id* when it is started."""
    return _producer(producer_settings(config, transactional_id=transactional_id))


def _consumer(config: Config, settings: Mapping[str, Any]) -> AIOKafkaConsumer:
    """Make a consumer that reads what others would fall over, and asks brokers in measure."""
    expansion.install(config.limits.record_bytes)
    header_names.install()
    consumer = paced(AIOKafkaConsumer(**settings))
    _ask_in_measure(consumer._client)  # noqa: SLF001 - held by a test
    return consumer


def _producer(settings: Mapping[str, Any]) -> AIOKafkaProducer:
    """Make a producer that asks brokers in measure."""
    producer = AIOKafkaProducer(**settings)
    _ask_in_measure(producer.client)
    return producer


def _ask_in_measure(client: AIOKafkaClient) -> None:
    """Have *client*, which has not been started, neither ask as fast as it can nor wait long for who says nothing."""
    pace_metadata(client)
    ask_the_next_address(client)


class Startable(Protocol):
    """A consumer or a producer."""

    async def start(self) -> None:
        """Connect."""


async def connect_client(client: Startable) -> None:
    """Start *client*; without a deadline, as the client's own ``start``.

    A broker that has only just started, or thawed, may answer that there is no broker at all. The client takes that for
    metadata, and then dies of an assertion: here, where it asks for a coordinator while it starts, or in a task of its
    own soon after, for which the caller looks.

    Raises:
        KafkaError, OSError: as ``start``.
        KafkaConnectionError: also where the broker does not know the cluster yet.
    """
    try:
        await client.start()
    except AssertionError as error:
        raise KafkaConnectionError(_UNKNOWN_CLUSTER) from error


@contextmanager
def its_assertions_are_failures() -> Iterator[None]:
    """Around steps of a client: tell what it trips over within itself as a step of its that has failed.

    Of an outage it may hear at a moment it does not expect: then a state that it has left is asserted, or a future
    resolved that is done. Such a client is thrown away, as after any other failure. What others raise passes.

    Raises:
        KafkaError: for an AssertionError or InvalidStateError out of the client's own code.
    """
    try:
        yield
    except (AssertionError, asyncio.InvalidStateError) as error:
        *_, innermost = traceback.walk_tb(error.__traceback__)
        if not str(innermost[0].f_globals.get("__name__")).startswith("aiokafka."):
            raise
        raise KafkaError(f"the client is in a state that it does not expect: {error!r}") from error


def see_that_the_cluster_is_known(client: AIOKafkaConsumer) -> None:
    """Check that the metadata of a client that has just started name a broker.

    Raises:
        KafkaConnectionError: they do not.
    """
    if not client._client.cluster.brokers():  # noqa: SLF001 - held by a test
        raise KafkaConnectionError(_UNKNOWN_CLUSTER)


_UNKNOWN_CLUSTER = "the broker does not know the cluster yet"

_send: Callable[..., Any] = AIOKafkaConnection.send


def send_or_say_closed(connection: AIOKafkaConnection, request: Any, expect_response: bool = True) -> Any:  # noqa: FBT001, FBT002 - the client's own signature
    """Send a request, as the client's own ``send``, which this one replaces in every client of the process.

    Between the end of a connection and the client's notice of it, asyncio's transports take what is written and drop
    it; uvloop's raise ``RuntimeError``, which no part of the client expects: its tasks die of it.

    Raises:
        KafkaConnectionError: the connection is closed; the client makes another.
        NotImplementedError, IncompatibleBrokerVersion: the broker does not speak the request's version, or not the
            request at all; the connection is as good as before.
    """
    try:
        return _send(connection, request, expect_response)
    except (NotImplementedError, KafkaError):  # RuntimeErrors too
        raise
    except RuntimeError as error:
        connection.close(reason=CloseReason.CONNECTION_BROKEN)
        raise KafkaConnectionError(f"Connection at {connection.host}:{connection.port} closed: {error}") from error


AIOKafkaConnection.send = send_or_say_closed  # type: ignore[method-assign]  # a test shows that it is needed

__all__ = [
    "NotAKafkaAnswer",
    "TopicPartition",
    "connect_client",
    "its_assertions_are_failures",
    "make_consumer",
    "make_producer",
    "make_reader",
    "make_transactional_producer",
    "see_that_the_cluster_is_known",
    "send_or_say_closed",
]
