"""The commands that talk to a broker, and the questions the service asks at start, on real brokers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiokafka
import pytest
import yaml
from confluent_kafka import Consumer, Producer, TopicPartition

from brokers import Broker, answers, unused_port, wait_until
from consumer.config import Config, load
from consumer.errors import ConfigError
from consumer.kafka.topics import EARLIEST, LATEST, Cluster, GroupState, inspect_topics
from service_process import clean_environment, command_line
from wire import operation

pytestmark = [pytest.mark.slow, pytest.mark.process]


class Desk:
    """Topics of one test, and the command line configured for them."""

    def __init__(self, broker: Broker, folder: Path, partitions: int = 2) -> None:
        self.broker = broker
        self.folder = folder
        self.operations = broker.create_topic("operations", partitions)
        self.responses = broker.create_topic("responses", partitions)
        self.dead = broker.create_topic("dead", partitions)
        self.group = broker.unused_name("group")
        self.tree: dict[str, Any] = {
            "kafka": {"bootstrap_servers": [broker.bootstrap], "group_id": self.group},
            "input": {"topics": [self.operations]},
            "output": {"topic": self.responses},
            "dead_letter": {"topic": self.dead},
        }

    @property
    def config(self) -> Config:
        """The configuration, for questions without a command."""
        return load(self.write(), {})

    def write(self) -> Path:
        """Write the configuration file."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.tree), encoding="utf-8")
        return path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the configuration."""
        return command_line(*arguments, "--config", str(self.write()), cwd=self.folder)

    def json(self, *arguments: str) -> Any:
        """Run a command that succeeds; its stdout as JSON."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def put(self, topic: str, *values: bytes | None, partition: int = 0) -> None:
        """Write records by another client."""
        producer = Producer({"bootstrap.servers": self.broker.bootstrap, "log_level": 0})
        for value in values:
            producer.produce(topic, value, partition=partition)
        assert producer.flush(20) == 0

    def records(self, topic: str, count: int) -> list[Any]:
        """Read records by another client."""
        settings: dict[str, Any] = {"group.id": "none", "enable.auto.commit": False, "log_level": 0}
        reader = Consumer(settings | {"bootstrap.servers": self.broker.bootstrap})
        partitions = len(self.broker.admin.list_topics(timeout=20).topics[topic].partitions)
        reader.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
        found: list[Any] = []

        def complete() -> bool:
            found.extend(record for record in reader.consume(100, timeout=0.2) if not record.error())
            return len(found) >= count

        wait_until(complete, 20, f"{count} records in {topic}")
        reader.close()
        return found

    def commit(self, partition: int, offset: int, metadata: str = "") -> None:
        """Commit by a bare client; the other one would end the metadata with a zero byte."""

        async def commit() -> None:
            place = aiokafka.TopicPartition(self.operations, partition)
            member = aiokafka.AIOKafkaConsumer(
                bootstrap_servers=self.broker.bootstrap, group_id=self.group, enable_auto_commit=False
            )
            await member.start()
            try:
                member.assign([place])
                await member.commit({place: aiokafka.OffsetAndMetadata(offset, metadata)})
            finally:
                await member.stop()

        asyncio.run(commit())


@pytest.fixture
def desk(broker: Broker, tmp_path: Path) -> Desk:
    """Topics and a configuration, on each broker."""
    return Desk(broker, tmp_path)


class TestCluster:
    """Questions, each asked of real brokers."""

    async def test_it_knows_topics_and_creates_none(self, desk: Desk) -> None:
        """Looking for a topic must not create it."""
        absent = desk.broker.unused_name("absent")
        async with Cluster(desk.config) as cluster:
            found = await cluster.topics([desk.operations, absent])
            identity = await cluster.cluster_id()

        known = found[desk.operations]
        assert found[absent] is None
        assert known
        assert known.partitions == 2
        assert identity
        assert absent not in desk.broker.admin.list_topics(timeout=20).topics

    async def test_it_knows_where_partitions_begin_and_end(self, desk: Desk) -> None:
        """High watermarks, by time too."""
        await asyncio.to_thread(desk.put, desk.operations, b"a", b"b", b"c")
        places = [(desk.operations, 0), (desk.operations, 1)]
        async with Cluster(desk.config) as cluster:
            first, last = await cluster.offsets(places, EARLIEST), await cluster.offsets(places, LATEST)
            at_the_epoch, never = await cluster.offsets(places, 0), await cluster.offsets(places, 2**42)

        assert list(first.values()) == [0, 0]
        assert list(last.values()) == [3, 0]
        assert at_the_epoch == first
        assert never == last

    async def test_it_knows_commits_with_their_metadata(self, desk: Desk) -> None:
        """Where reading goes on depends on it; asked for all, and for some."""
        await asyncio.to_thread(desk.put, desk.operations, b"a", b"b")
        async with Cluster(desk.config) as cluster:
            nothing = await cluster.committed(desk.group)
            nobody = await cluster.group(desk.group)
            await asyncio.to_thread(desk.commit, 0, 2, "ts1:words")
            everything = await cluster.committed(desk.group)
            some = await cluster.committed(desk.group, [(desk.operations, 0), (desk.operations, 1)])

        assert (nothing, nobody) == ({}, GroupState("Dead", 0))
        assert [(place, found.offset, found.metadata) for place, found in everything.items()] == [
            ((desk.operations, 0), 2, "ts1:words")
        ]
        assert some == everything

    async def test_it_creates_what_is_missing_with_room_for_the_largest_record(self, desk: Desk) -> None:
        """Contract 6: `topics.create`."""
        absent = desk.broker.unused_name("created")
        desk.tree["output"]["topic"] = absent
        desk.tree["topics"] = {"create": True, "partitions": 3, "replication_factor": 1}

        plan = await inspect_topics(desk.config)
        async with Cluster(desk.config) as cluster:
            settings = await cluster.settings([absent], ["max.message.bytes"])

        assert (plan.output_partitions, plan.input_partitions) == (3, {desk.operations: 2})
        assert int(settings[absent]["max.message.bytes"]) > 3 * 2**20

    async def test_too_many_copies_are_refused_in_words(self, desk: Desk) -> None:
        """Contract 11: configuration, exit 2."""
        desk.tree["output"]["topic"] = desk.broker.unused_name("copies")
        desk.tree["topics"] = {"create": True, "replication_factor": 3}

        with pytest.raises(ConfigError, match="creating topic"):
            await inspect_topics(desk.config)

    async def test_a_compacted_output_topic_is_seen(self, desk: Desk) -> None:
        """Contract 2.3."""
        desk.tree["output"]["topic"] = desk.broker.create_topic("compacted", 1, cleanup_policy="compact")

        with pytest.raises(ConfigError, match="is compacted"):
            await inspect_topics(desk.config)


class TestProduce:
    """`produce`."""

    def test_lines_become_records_that_the_wire_format_knows(self, desk: Desk) -> None:
        """Contract 7: keys, partitions, and bytes as another Avro implementation writes them."""
        lines = [
            {"kind": "head", "usecase": "u", "scopes": [["org", "1"]], "key": "k", "request_id": "r", "partition": 1},
            {"kind": "insert", "usecase": "u", "payload": "x"},
        ]
        (desk.folder / "f.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

        outcome = desk.json("produce", "--file", "f.jsonl", "--json")
        found = {record.key(): record for record in desk.records(desk.operations, 2)}

        assert outcome == {"topic": desk.operations, "sent": 2, "bad": 0}
        assert set(found) == {b"u/org.1/objects/k", None}
        head = found[b"u/org.1/objects/k"]
        assert head.partition() == 1
        assert head.value() == operation("head", "k", usecase="u", scopes=[("org", "1")], request_id="r")

    def test_bad_lines_are_named_and_skipped(self, desk: Desk) -> None:
        """Contract 7: exit 1; the others are written, also from standard input."""
        good = {"kind": "get", "usecase": "u", "key": "a"}
        bad = {**good, "partition": 9}
        lines = f"{json.dumps(good)}\nnonsense\n{json.dumps(bad)}\n"

        done = subprocess.run(
            [sys.executable, "-m", "consumer", "produce", "--file", "-", "--config", str(desk.write())],
            input=lines,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        assert done.returncode == 1, done.stderr
        assert done.stdout == f"1 records sent to {desk.operations}, 2 bad lines skipped\n"
        assert "error: line 2: it is no JSON" in done.stderr
        assert f"error: line 3: topic {desk.operations} has partitions 0 to 1, not 9" in done.stderr
        assert len(desk.records(desk.operations, 1)) == 1

    def test_a_record_too_large_for_the_topic_is_a_bad_line(self, desk: Desk) -> None:
        """Sent, it would break the sequence of the producer (H18)."""
        desk.tree["input"]["topics"] = [desk.broker.create_topic("small", 1, max_message_bytes=2000)]
        lines = [
            {"kind": "insert", "usecase": "u", "payload": "x" * 3000},
            {"kind": "get", "usecase": "u", "key": "k"},
        ]
        (desk.folder / "f.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

        done = desk.run("produce", "--file", "f.jsonl")

        assert done.returncode == 1
        assert "error: line 1: " in done.stderr
        assert "more than topic" in done.stderr
        assert done.stdout.startswith("1 records sent")

    def test_count_makes_synthetic_inserts_at_a_rate(self, desk: Desk) -> None:
        """Contract 7: `--count` without `--file`."""
        assert desk.json("produce", "--count", "30", "--rate", "1000", "--json")["sent"] == 30
        assert len({record.key() for record in desk.records(desk.operations, 30)}) == 30

    def test_a_missing_topic_is_not_created(self, desk: Desk) -> None:
        """A slip of the pen must not make a topic."""
        absent = desk.broker.unused_name("absent")

        done = desk.run("produce", "--count", "1", "--topic", absent)

        assert (done.returncode, done.stderr) == (1, f"error: there is no topic {absent}\n")
        assert absent not in desk.broker.admin.list_topics(timeout=20).topics


class TestTail:
    """`tail`."""

    def test_without_responses_it_ends_at_once(self, desk: Desk) -> None:
        """Nothing is data too."""
        done = desk.run("tail", "--from-beginning")

        assert (done.returncode, done.stdout) == (0, "")

    def test_what_is_no_response_is_shown_as_such(self, desk: Desk) -> None:
        """Exit 1, and the rest is shown."""
        desk.put(desk.responses, b"\x01", None)

        done = desk.run("tail", "--from-beginning")
        lines = [json.loads(line) for line in done.stdout.splitlines()]

        assert done.returncode == 1
        assert [line["error"]["code"] for line in lines] == ["decode_error", "null_value"]
        assert [(line["partition"], line["offset"]) for line in lines] == [(0, 0), (0, 1)]

    def test_the_last_ones_are_the_last_of_all_partitions(self, desk: Desk) -> None:
        """Without an option: the last 10, or `--limit`, in the order of time."""
        for number in range(3):
            desk.put(desk.responses, b"\x01", b"\x01", partition=number % 2)

        done = desk.run("tail", "--limit", "3")
        places = [(line["partition"], line["offset"]) for line in map(json.loads, done.stdout.splitlines())]

        assert places == [(1, 1), (0, 2), (0, 3)]

    def test_following_shows_what_comes_until_the_limit(self, desk: Desk) -> None:
        """`--follow --limit N` begins at the end."""
        desk.put(desk.responses, b"old")
        command = ["tail", "--follow", "--limit", "2", "--config", str(desk.write())]
        with subprocess.Popen(
            [sys.executable, "-m", "consumer", *command],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout
            # It cannot be seen from outside when it has found the end: put until it shows something.
            def ended() -> bool:
                desk.put(desk.responses, b"new")
                return process.poll() is not None

            wait_until(ended, 30, "the tail to end")
            lines = process.stdout.read().splitlines()

        offsets = [json.loads(line)["offset"] for line in lines]
        assert len(offsets) == 2
        assert offsets[0] > 0

    def test_an_open_transaction_is_not_waited_for(self, desk: Desk) -> None:
        """What is there now ends where an open transaction begins (read_committed)."""
        desk.put(desk.responses, b"\x01")
        producer = Producer(
            {"bootstrap.servers": desk.broker.bootstrap, "transactional.id": desk.group, "log_level": 0}
        )
        producer.init_transactions(20)
        producer.begin_transaction()
        producer.produce(desk.responses, b"open", partition=0)
        producer.flush(20)

        done = desk.run("tail", "--from-beginning")
        producer.abort_transaction(20)
        after = desk.run("tail", "--from-beginning")

        assert len(done.stdout.splitlines()) == len(after.stdout.splitlines()) == 1


class TestLag:
    """`lag`."""

    def test_it_tells_what_is_committed_and_what_is_not(self, desk: Desk) -> None:
        """Contract 7: the JSON's shape."""
        desk.put(desk.operations, b"a", b"b", b"c")
        desk.commit(0, 1, "ts1:abcd")

        rows = desk.json("lag", "--json")

        assert rows == [
            {
                "topic": desk.operations,
                "partition": 0,
                "committed": 1,
                "end": 3,
                "lag": 2,
                "map_bytes": 8,
                "finished_above_gap": None,
            },
            {
                "topic": desk.operations,
                "partition": 1,
                "committed": None,
                "end": 0,
                "lag": None,
                "map_bytes": 0,
                "finished_above_gap": None,
            },
        ]

    def test_the_table_has_a_line_for_each_partition(self, desk: Desk) -> None:
        """For people."""
        done = desk.run("lag", "--group", "another")
        head, *rows = done.stdout.splitlines()

        assert head.split()[:3] == ["topic", "partition", "committed"]
        assert [row.split()[:2] for row in rows] == [[desk.operations, "0"], [desk.operations, "1"]]


class TestCheckConfigOnline:
    """`check-config --online`."""

    def test_all_is_well_where_everything_is_there(self, desk: Desk) -> None:
        """Exit 0, and what was not checked is listed."""
        desk.tree["output"] |= {"max_request_bytes": "700KiB"}
        desk.tree["limits"] = {"record_bytes": "500KiB", "response_bytes": "600KiB"}

        said = desk.json("check-config", "--online", "--json")

        assert not [check for check in said["checks"] if check["ok"] is False]
        assert [check["check"] for check in said["checks"] if check["ok"] is None]

    def test_what_is_missing_is_named(self, desk: Desk) -> None:
        """Exit 1."""
        absent = desk.broker.unused_name("absent")
        desk.tree["dead_letter"]["topic"] = absent

        done = desk.run("check-config", "--online")

        assert done.returncode == 1
        assert f"FAILED       topic {absent}: missing" in done.stdout

    def test_a_topic_with_a_lower_limit_than_the_responses_is_named(self, desk: Desk) -> None:
        """Contract 6: compares the topics' max.message.bytes with the limits."""
        desk.tree["output"]["topic"] = desk.broker.create_topic("small", 1, max_message_bytes=100_000)

        done = desk.run("check-config", "--online")

        assert done.returncode == 1
        assert f"FAILED       max.message.bytes of {desk.tree['output']['topic']}: 100000" in done.stdout


def test_the_broker_command_serves_topics_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """Contract 7: `broker [--port N] [--data-dir DIR]`; needs no broker of the suite's own."""
    port = unused_port()
    command = [sys.executable, "-m", "consumer", "broker", "--json", "--port", str(port), "--data-dir", "data"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        said = json.loads(process.stdout.readline())
        served = answers(said["bootstrap"])
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)

    assert said["bootstrap"] == f"127.0.0.1:{port}"
    assert said["topics"] == ["operations", "operations.dlq", "responses"]
    assert (served, answers(said["bootstrap"])) == (True, False)
    assert process.returncode == 130
