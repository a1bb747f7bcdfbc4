"""Unstarted Kafka clients, as the service wants them configured."""

from __future__ import annotations

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

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


def make_transactional_producer(config: Config, transactional_id: str) -> AIOKafkaProducer:
    """Make a producer that fences all others of the same *transactional_id* when it is started."""
    return AIOKafkaProducer(**producer_settings(config, transactional_id=transactional_id))


__all__ = ["TopicPartition", "make_consumer", "make_producer", "make_transactional_producer"]
