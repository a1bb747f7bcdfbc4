"""Unstarted Kafka clients, as the service wants them configured."""

from __future__ import annotations

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from consumer.config import Config
from consumer.kafka.connection import consumer_settings, producer_settings


def make_consumer(config: Config) -> AIOKafkaConsumer:
    """Make a consumer in the group, without subscription.

    Subscribing before ``start`` would make ``start`` wait for the first assignment without limit (hazard H17).
    """
    return AIOKafkaConsumer(**consumer_settings(config))


def make_producer(config: Config, batch_bytes: int) -> AIOKafkaProducer:
    """Make an idempotent producer for batches of at most *batch_bytes* before compression."""
    return AIOKafkaProducer(**producer_settings(config, batch_bytes=batch_bytes))

