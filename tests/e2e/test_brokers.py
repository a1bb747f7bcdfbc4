"""The brokers themselves, before anything is concluded from a test on one: what is acknowledged can be read back."""

from __future__ import annotations

from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from brokers import Broker


def test_a_broker_gives_back_what_it_acknowledged_at_its_offsets(broker: Broker) -> None:
    """Fixtures: both brokers keep key, value, headers and position of a record."""
    topic = broker.create_topic("kept", partitions=2)
    acknowledged = []
    producer = Producer({"bootstrap.servers": broker.bootstrap, "enable.idempotence": True})
    for number in range(3):
        producer.produce(
            topic,
            value=b"%d" % number,
            key=None,
            partition=1,
            headers=[("a", b"1"), ("a", b"2")],
            on_delivery=lambda error, record: acknowledged.append((error, record.offset())),
        )
    assert producer.flush(20) == 0

    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "none", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 1, 0)])
    records = consumer.consume(3, timeout=20)
    consumer.close()

    assert acknowledged == [(None, 0), (None, 1), (None, 2)]
    assert [(record.key(), record.value(), record.offset()) for record in records] == [
        (None, b"0", 0),
        (None, b"1", 1),
        (None, b"2", 2),
    ]
    assert records[0].headers() == [("a", b"1"), ("a", b"2")]


def test_a_topic_nobody_created_does_not_exist(broker: Broker) -> None:
    """Fixtures: nothing is created by listing all there is, so that missing topics can be tested.

    Asked for one topic by its name, noida-db creates it.
    """
    name = broker.unused_name("nobody")

    broker.admin.list_topics(timeout=20)

    assert name not in broker.admin.list_topics(timeout=20).topics


def test_a_limit_on_record_size_is_kept(apache: Broker) -> None:
    """Fixtures: a topic's own limit refuses a record, and a raised one takes 10 MiB."""
    small = apache.create_topic("small", max_message_bytes=10_000)
    large = apache.create_topic("large", max_message_bytes=12_000_000)
    producer = Producer({"bootstrap.servers": apache.bootstrap, "message.max.bytes": 12_000_000})
    errors = {}
    for topic, size in ((small, 20_000), (large, 10_485_760)):
        producer.produce(
            topic, value=bytes(size), on_delivery=lambda error, record: errors.update({record.topic(): error})
        )
    assert producer.flush(20) == 0

    assert errors[large] is None
    assert errors[small] == KafkaError.MSG_SIZE_TOO_LARGE
