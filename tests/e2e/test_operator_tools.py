"""The commands of whoever is on call: the ledger, putting records back, looking at one, on real brokers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml
from confluent_kafka import Consumer, Producer, TopicPartition

from brokers import Broker, wait_until
from consumer.config import load
from consumer.kafka import tools
from registry_stub import StandingRegistry, by_id
from service_process import command_line
from stages import SetStage, Stage
from wire import METADATA, SCHEMAS, datum, operation

pytestmark = [pytest.mark.slow, pytest.mark.process]

Headers: TypeAlias = list[tuple[str, bytes | None]]


class Desk:
    """Topics of one test without a service, and the command line configured for them."""

    def __init__(self, broker: Broker, folder: Path, partitions: int = 2) -> None:
        self.broker = broker
        self.folder = folder
        self.partitions = partitions
        self.operations = broker.create_topic("operations", partitions)
        self.responses = broker.create_topic("responses", partitions)
        self.dead = broker.create_topic("dead", partitions)
        self.tree: dict[str, Any] = {
            "kafka": {"bootstrap_servers": [broker.bootstrap], "group_id": broker.unused_name("group")},
            "input": {"topics": [self.operations]},
            "output": {"topic": self.responses},
            "dead_letter": {"topic": self.dead},
        }
        self._producer = Producer({"bootstrap.servers": broker.bootstrap, "log_level": 0})

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the configuration."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.tree), encoding="utf-8")
        return command_line(*arguments, "--config", str(path), cwd=self.folder)

    def json(self, *arguments: str, code: int = 0) -> Any:
        """Run a command that ends with *code*; its stdout as JSON."""
        done = self.run(*arguments, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    def put(
        self,
        topic: str,
        value: bytes | None,
        *,
        partition: int = 0,
        key: bytes | None = None,
        headers: Headers | None = None,
        timestamp: int = 0,
    ) -> None:
        """Write a record by another client; *timestamp* in milliseconds, 0 = now."""
        given: Any = headers or []
        self._producer.produce(topic, value, key, partition, headers=given, timestamp=timestamp)
        assert self._producer.flush(20) == 0

    def respond(self, offset: int, kind: str, key: str | None, result: Any, status: int, **more: Any) -> None:
        """Write a response to a record of partition 0, as the wire format has it."""
        response = {
            "index": offset,
            "source": {"topic": self.operations, "partition": 0, "offset": offset},
            "request_id": None,
            "context": {"usecase": "e2e", "scopes": [{"name": "org", "value": "1"}]},
            "kind": kind,
            "key": key,
            "status": status,
            "result": result,
            "completed_at": 0,
        }
        identity = f"{self.operations}/0/{offset}".encode()
        self.put(self.responses, datum("response", response | more), headers=[("tierstream-response-id", identity)])

    def reader(self) -> Consumer:
        """Make a client that reads."""
        settings: dict[str, Any] = {"group.id": "none", "enable.auto.commit": False, "log_level": 0}
        return Consumer(settings | {"bootstrap.servers": self.broker.bootstrap})

    def ends(self, topic: str) -> list[int]:
        """Return the high watermark of each partition."""
        reader = self.reader()
        places = [TopicPartition(topic, number) for number in range(self.partitions)]
        ends = [reader.get_watermark_offsets(place, timeout=20)[1] for place in places]
        reader.close()
        return ends

    def records(self, topic: str, count: int) -> list[Any]:
        """Read the first *count* records by another client."""
        reader = self.reader()
        reader.assign([TopicPartition(topic, number, 0) for number in range(self.partitions)])
        found: list[Any] = []

        def complete() -> bool:
            found.extend(record for record in reader.consume(100, timeout=0.2) if not record.error())
            return len(found) >= count

        wait_until(complete, 20, f"{count} records in {topic}")
        reader.close()
        return found


@pytest.fixture
def desk(broker: Broker, tmp_path: Path) -> Desk:
    """Topics and a configuration, on each broker."""
    return Desk(broker, tmp_path)


def verify(stage: Stage, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run `verify` on the topics of a service."""
    path = stage.folder / "verify.yaml"
    path.write_text(yaml.safe_dump(stage.config), encoding="utf-8")
    done = command_line("verify", "--json", *arguments, "--config", str(path), cwd=stage.folder)
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class TestVerify:
    """`verify`: the production ledger, as a second opinion."""

    def test_it_agrees_with_the_other_ledger_on_a_running_service(self, set_stage: SetStage, broker: Broker) -> None:
        """Contract 7: all kinds, failures, poison and keyless inserts fit; ledger and command share nothing."""
        stage = set_stage(broker, partitions=2)
        stage.start(partitions=2)
        ledger = stage.ledger
        for number in range(60):
            partition = number % 2
            ledger.operate("insert", f"k{number}", b"x" * number, partition=partition, wait=False)
            ledger.operate("get", f"k{number}", partition=partition, wait=False)
            ledger.operate("head", f"no{number}", partition=partition, wait=False)
            ledger.operate("insert", None, b"keyless", partition=partition, wait=False)
            ledger.operate("delete", f"k{number}", partition=partition, wait=False)
            ledger.send(b"\xff" * number, partition=partition, wait=False)
        ledger.send(None)
        ledger.operate("insert", "by-reference", {"uri": "file:///nowhere/at/all"})
        ledger.operate("get", "k\x00")
        ledger.flush()

        found = verify(stage, "--wait", "40s")

        assert found == {"records": 363, "responses": 363, "missing": [], "duplicated": [], "mismatched": []}
        ledger.wait_answered()

    def test_records_nobody_answered_are_named(self, desk: Desk) -> None:
        """Exit 1, and every id."""
        for number in range(3):
            desk.put(desk.operations, operation("delete", f"k{number}"))
        desk.put(desk.operations, operation("delete", "k"), partition=1)
        desk.respond(1, "delete", "k1", ("Deleted", {}), 204)

        found = desk.json("verify", code=1)

        assert found == {
            "records": 4,
            "responses": 1,
            "missing": [f"{desk.operations}/0/0", f"{desk.operations}/0/2", f"{desk.operations}/1/0"],
            "duplicated": [],
            "mismatched": [],
        }

    def test_repeated_and_wrong_responses_are_named(self, desk: Desk) -> None:
        """Each by the id of its record; what is no response by its own place."""
        for number in range(3):
            desk.put(desk.operations, operation("delete", f"k{number}"))
        desk.respond(0, "delete", "k0", ("Deleted", {}), 204)
        desk.respond(0, "delete", "k0", ("Deleted", {}), 204)
        desk.respond(1, "delete", "another", ("Deleted", {}), 204)
        desk.respond(2, "delete", "k2", ("Inserted", {"metadata": dict(METADATA)}), 201)
        desk.put(desk.responses, b"nonsense", partition=1)

        found = desk.json("verify", code=1)
        done = desk.run("verify", "--allow-duplicates")

        assert found["duplicated"] == [f"{desk.operations}/0/0"]
        assert found["mismatched"] == [f"{desk.operations}/0/1", f"{desk.operations}/0/2", f"{desk.responses}/1/0"]
        assert done.returncode == 1
        assert f"mismatched  {desk.operations}/0/2: no such operation is answered with Inserted" in done.stdout
        assert done.stderr.startswith("error: there are mismatched responses\nhint: ")

    def test_duplicates_alone_can_be_allowed(self, desk: Desk) -> None:
        """At-least-once makes some."""
        desk.put(desk.operations, operation("delete", "k"))
        desk.respond(0, "delete", "k", ("Deleted", {}), 204)
        desk.respond(0, "delete", "k", ("Deleted", {}), 204)

        assert desk.json("verify", code=1)["duplicated"] == [f"{desk.operations}/0/0"]
        assert desk.json("verify", "--allow-duplicates")["duplicated"] == [f"{desk.operations}/0/0"]

    def test_a_range_is_what_is_asked_for(self, desk: Desk) -> None:
        """Contract 7: offsets and times, the end exclusive, per partition."""
        begin = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
        for number in range(4):
            moment = begin + timedelta(minutes=number)
            desk.put(desk.operations, operation("delete", f"k{number}"), timestamp=round(moment.timestamp() * 1000))
        third = round((begin + timedelta(minutes=2)).timestamp() * 1000)
        desk.put(desk.operations, operation("delete", "k"), partition=1, timestamp=third)

        def ids(*arguments: str) -> list[str]:
            missing: list[str] = desk.json("verify", *arguments, code=1)["missing"]
            return [identity.removeprefix(f"{desk.operations}/") for identity in missing]

        def at(**since: float) -> str:
            return (begin + timedelta(**since)).isoformat()

        assert ids("--from", "1", "--to", "3") == ["0/1", "0/2"]
        assert ids("--from", at(minutes=1), "--to", at(minutes=2)) == ["0/1"]
        assert ids("--from", at(minutes=1, milliseconds=1)) == ["0/2", "0/3", "1/0"]
        east = (begin + timedelta(minutes=1)).astimezone(timezone(timedelta(hours=2)))
        assert ids("--to", east.isoformat()) == ["0/0"]
        assert desk.json("verify", "--from", "latest")["records"] == 0

    def test_aborted_transactions_are_no_records_and_no_responses(self, desk: Desk) -> None:
        """Readers of committed records see neither; markers leave gaps (H9b)."""
        producer = Producer(
            {"bootstrap.servers": desk.broker.bootstrap, "transactional.id": desk.responses, "log_level": 0}
        )
        producer.init_transactions(20)
        for commit in (False, True, False):
            producer.begin_transaction()
            producer.produce(desk.operations, operation("delete", f"k{commit}"), partition=0)
            producer.produce(desk.responses, b"never mind" if not commit else None, partition=1)
            producer.flush(20)
            if commit:
                producer.commit_transaction(20)
            else:
                producer.abort_transaction(20)

        found = desk.json("verify", code=1)

        assert found["records"] == 1
        assert len(found["missing"]) == 1
        assert found["mismatched"] == [f"{desk.responses}/1/2"]

    @pytest.mark.parametrize("arguments", [["--from", "yesterday"], ["--to", "2026-01-31"], ["--wait", "long"]])
    def test_a_wrong_place_is_usage(self, desk: Desk, arguments: list[str]) -> None:
        """Contract 11: exit 2."""
        done = desk.run("verify", *arguments)

        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {arguments[0]}")


class TestReplay:
    """`replay`."""

    DEAD: Headers = [  # noqa: RUF012 - never changed
        ("traceparent", b"00-1"),
        ("traceparent", b"00-2"),
        ("tierstream-dlq-partition", b"1"),
        ("tierstream-dlq-offset", b"17"),
    ]

    def dead(self, desk: Desk, code: str, value: bytes | None, *more: tuple[str, bytes | None]) -> None:
        """Write a dead letter of partition 1 into partition 0 of the dead letter topic."""
        named: Headers = [("tierstream-dlq-topic", desk.operations.encode()), ("tierstream-dlq-code", code.encode())]
        desk.put(desk.dead, value, key=b"key", headers=[*self.DEAD, *named, *more])

    def test_dead_letters_go_back_to_where_they_came_from(self, desk: Desk) -> None:
        """Contract 7: value, key and headers kept, ours stripped, `tierstream-replay-of` added."""
        self.dead(desk, "panic", b"first", ("tierstream-replay-of", b"older/0/1"))
        self.dead(desk, "decode_error", b"other")
        self.dead(desk, "panic", b"second")

        said = desk.json("replay", desk.dead, "0", "--from", "earliest", "--to", "latest", "--code", "panic", "--yes")
        found = desk.records(desk.operations, 2)

        assert said == {"topic": desk.dead, "partition": 0, "from": 0, "to": 3, "replayed": 2, "skipped": 0}
        assert [(record.partition(), record.key(), record.value()) for record in found] == [
            (1, b"key", b"first"),
            (1, b"key", b"second"),
        ]
        assert found[0].headers() == [
            ("traceparent", b"00-1"),
            ("traceparent", b"00-2"),
            ("tierstream-replay-of", f"{desk.dead}/0/0".encode()),
        ]

    def test_records_of_the_input_topic_go_to_its_end(self, desk: Desk) -> None:
        """The range is fixed at the start: what is put back is not met again."""
        for number in range(3):
            desk.put(desk.operations, b"%d" % number, key=b"k")

        said = desk.json("replay", desk.operations, "0", "--from", "1", "--to", "latest", "--yes")
        found = desk.records(desk.operations, 5)

        assert said["replayed"] == 2
        assert [(record.partition(), record.value()) for record in found] == [
            (0, b"0"), (0, b"1"), (0, b"2"), (0, b"1"), (0, b"2"),
        ]  # fmt: skip

    def test_a_dead_letter_without_its_value_is_named_and_left_out(self, desk: Desk) -> None:
        """Exit 1; a value that is null by itself goes back."""
        self.dead(desk, "panic", None, ("tierstream-dlq-truncated", b"true"))
        self.dead(desk, "null_value", None)

        done = desk.run("replay", desk.dead, "0", "--from", "0", "--to", "latest", "--yes")
        (found,) = desk.records(desk.operations, 1)

        assert done.returncode == 1
        assert f"error: {desk.dead}/0/0: its value did not fit" in done.stderr
        assert found.value() is None

    def test_a_dry_run_says_what_and_writes_nothing(self, desk: Desk) -> None:
        """Contract 7: `--dry-run` on every changing command."""
        self.dead(desk, "panic", b"first")

        done = desk.run("replay", desk.dead, "0", "--from", "earliest", "--to", "latest", "--dry-run")

        assert (done.returncode, done.stdout) == (0, "1 records would be put back\n")
        assert f"{desk.dead}/0/0 to {desk.operations}, partition 1: " in done.stderr
        assert desk.ends(desk.operations) == [0, 0]

    def test_without_yes_and_without_a_terminal_nothing_happens(self, desk: Desk) -> None:
        """Exit 2, and how to go on."""
        self.dead(desk, "panic", b"first")

        done = desk.run("replay", desk.dead, "0", "--from", "earliest", "--to", "latest")

        assert (done.returncode, done.stdout) == (2, "")
        assert "hint: give --yes to go on" in done.stderr

    def test_at_a_rate(self, desk: Desk) -> None:
        """Contract 7: `--rate`."""
        for _ in range(5):
            self.dead(desk, "panic", b"x")

        began = time.monotonic()
        desk.json("replay", desk.dead, "0", "--from", "earliest", "--to", "latest", "--rate", "2", "--yes")

        assert time.monotonic() - began >= 2

    def test_a_partition_that_is_not_there(self, desk: Desk) -> None:
        """Exit 1, in words."""
        done = desk.run("replay", desk.dead, "7", "--from", "earliest", "--to", "latest", "--yes")

        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: topic {desk.dead} has partitions 0 to 1, not 7\n")


class TestInspect:
    """`inspect`."""

    def test_any_record_of_any_topic_can_be_looked_at(self, desk: Desk) -> None:
        """Contract 7: an operation, a response, and what is neither."""
        headers: Headers = [("a", b"1"), ("a", None)]
        desk.put(desk.operations, operation("insert", "k", b"payload"), key=b"key", headers=headers)
        desk.put(desk.operations, b"nonsense")
        desk.respond(0, "delete", "k", ("Deleted", {}), 204)

        first = desk.json("inspect", desk.operations, "0", "0")
        second = desk.json("inspect", desk.operations, "0", "1")
        response = desk.json("inspect", desk.responses, "0", "0")

        assert (first["topic"], first["partition"], first["offset"]) == (desk.operations, 0, 0)
        assert (first["key_base64"], first["headers"]) == ("a2V5", [["a", "1"], ["a", None]])
        assert abs(first["timestamp"] / 1000 - time.time()) < 600
        assert first["operation"]["body"]["key"] == "k"
        assert second["error"]["code"] == "decode_error"
        assert response["response"]["status"] == 204

    def test_a_place_without_a_record_is_exit_1_with_what_there_is(self, desk: Desk) -> None:
        """Contract 11: not a wait for ever."""
        desk.put(desk.operations, b"only")

        beyond, empty = desk.run("inspect", desk.operations, "0", "1"), desk.run("inspect", desk.operations, "1", "0")

        assert (beyond.returncode, empty.returncode) == (1, 1)
        assert beyond.stderr == f"error: {desk.operations}/0 has offsets 0 to 0, not 1\n"
        assert empty.stderr == f"error: there are no records in {desk.operations}/1\n"

    def test_a_transactions_end_is_no_record(self, desk: Desk) -> None:
        """H9b; what was aborted can be looked at all the same."""
        producer = Producer(
            {"bootstrap.servers": desk.broker.bootstrap, "transactional.id": desk.dead, "log_level": 0}
        )
        producer.init_transactions(20)
        producer.begin_transaction()
        producer.produce(desk.operations, b"aborted", partition=0)
        producer.flush(20)
        producer.abort_transaction(20)
        # The broker answers before it writes the marker.
        wait_until(lambda: desk.ends(desk.operations) == [2, 0], 20, "the transaction's marker")
        desk.put(desk.operations, b"after")

        assert desk.json("inspect", desk.operations, "0", "0")["error"]["code"] == "decode_error"
        marker = desk.run("inspect", desk.operations, "0", "1")
        assert marker.returncode == 1
        assert "no record at" in marker.stderr


class TestRunningService:
    """`why` and `top` on a real service."""

    def test_they_speak_of_its_partitions(self, stage: Stage) -> None:
        """Contract 7, 8: the state is really of that shape."""
        stage.ledger.operate("head", "k")
        stage.ledger.wait_answered()
        address = stage.processes[-1].admin

        why = command_line("why", "--url", address, "--json", cwd=stage.folder)
        top = command_line("top", "--url", address, cwd=stage.folder)
        rows = json.loads(why.stdout)

        assert {(row["topic"], row["partition"]) for row in rows} == {(stage.ledger.input, number) for number in (0, 1)}
        assert all(row["words"].startswith(f"partition {row['topic']}/{row['partition']} ") for row in rows)
        assert top.stdout.startswith("tierstream running")
        assert top.stdout.count(f"{stage.ledger.input}/") == 2


class TestRegistry:
    """Values whose schema only a registry knows."""

    @pytest.fixture
    def registry(self) -> Iterator[StandingRegistry]:
        """A schema registry that knows the operation's schema as number 1."""
        standing = StandingRegistry()
        standing.stub.add((SCHEMAS / "operation.avsc").read_text(encoding="utf-8"))
        yield standing
        standing.close()

    def test_they_are_asked_for_and_held_against_their_responses(
        self, desk: Desk, registry: StandingRegistry
    ) -> None:
        """Contract 2.4: `verify` and `inspect` decode them as the service does."""
        desk.tree["schema_registry"] = {"url": registry.stub.url}
        for schema_id, key in ((1, "right"), (1, "wrong"), (2, "unknown")):
            desk.put(desk.operations, by_id(schema_id, operation("delete", key)))
        desk.respond(0, "delete", "right", ("Deleted", {}), 204)
        desk.respond(1, "delete", "another", ("Deleted", {}), 204)
        desk.respond(2, "delete", "unknown", ("Deleted", {}), 204)

        found = desk.json("verify", code=1)
        shown = desk.json("inspect", desk.operations, "0", "0")

        assert found["mismatched"] == [f"{desk.operations}/0/1"]
        assert (found["missing"], found["duplicated"]) == ([], [])
        assert (shown["framing"], shown["schema_id"]) == ("confluent", "1")
        assert shown["operation"]["body"] == {"type": "Delete", "key": "right"}


class TestStorage:
    """`storage` on the files of a running service."""

    def test_objects_are_looked_at_checked_and_removed_beside_it(self, set_stage: SetStage, embedded: Broker) -> None:
        """Contract 7: nothing it does harms what the service does, and the service sees it."""
        stage = set_stage(embedded, storage={"threshold": "1KiB"})
        stage.start(partitions=2)
        ledger = stage.ledger
        ledger.operate("insert", "small", b"a payload")
        ledger.operate("insert", "large", b"x" * 5000)
        ledger.operate("insert", "large", b"y" * 5000)
        ledger.wait_answered()
        path = stage.folder / "storage.yaml"
        path.write_text(yaml.safe_dump(stage.config), encoding="utf-8")

        def run(*arguments: str, code: int = 0) -> str:
            done = command_line("storage", *arguments, "--config", str(path), cwd=stage.folder)
            assert done.returncode == code, done.stderr
            return done.stdout

        small = ("e2e", "small", "--scope", "org=1")
        assert run("get", *small) == "a payload"
        assert run("get", "e2e/org.1/objects/large") == "y" * 5000
        assert json.loads(run("head", "e2e/org.1/objects/large", "--json"))["tier"] == "long_term"

        def settled() -> bool:
            """The replaced revision is removed in the background."""
            found = json.loads(run("verify", "--min-age", "0s", "--json"))
            assert (found["orphans"], found["dangling"]) == ([], [])
            return bool(found["revisions"] == 1 and found["changes"] == 0)

        wait_until(settled, 30, "the replaced revision to go")
        run("rm", *small, "--yes")
        run("rm", "e2e/org.1/objects/large", "--yes")

        for key in ("small", "large"):
            assert ledger.answer(ledger.operate("get", key, statuses={404})).status == 404
        assert json.loads(run("verify", "--json"))["revisions"] == 0
        assert verify(stage, "--wait", "20s")["missing"] == []


async def test_a_fetch_of_many_small_records_is_unpacked_bit_by_bit(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few MiB of compressed records are hundreds of MiB unpacked: memory stays bounded, whatever they compress to."""
    count = tools.RECORDS_AT_ONCE * 4 + 1

    def fill() -> None:
        producer = Producer(
            {"bootstrap.servers": desk.broker.bootstrap, "compression.type": "lz4", "linger.ms": 100, "log_level": 0}
        )
        for _ in range(count):
            producer.produce(desk.operations, b"x" * 100, partition=0)
        assert producer.flush(20) == 0

    await asyncio.to_thread(fill)
    path = desk.folder / "config.yaml"
    path.write_text(yaml.safe_dump(desk.tree), encoding="utf-8")
    taken: list[int] = []
    async with tools.open_reader(load(path, {}), desk.operations, 0) as (reader, (place,), _, ends):
        getmany = reader.getmany

        async def watched(**given: Any) -> Any:
            batches = await getmany(**given)
            taken.append(sum(map(len, batches.values())))
            return batches

        monkeypatch.setattr(reader, "getmany", watched)
        reader.seek(place, 0)
        offsets = [record.offset async for record in tools.read_until(reader, ends)]

    assert offsets == list(range(count))
    assert max(taken) <= tools.RECORDS_AT_ONCE


async def test_reading_goes_on_where_it_ended(desk: Desk) -> None:
    """A fetch brings what was written since the end was asked for; who reads on later must not miss it."""

    def write(first: int, last: int) -> None:
        producer = Producer({"bootstrap.servers": desk.broker.bootstrap, "log_level": 0})
        for number in range(first, last):
            producer.produce(desk.operations, b"%d" % number, partition=0)
        assert producer.flush(20) == 0

    await asyncio.to_thread(write, 0, 20)
    path = desk.folder / "config.yaml"
    path.write_text(yaml.safe_dump(desk.tree), encoding="utf-8")
    async with tools.open_reader(load(path, {}), desk.operations, 0) as (reader, (place,), _, _ends):
        reader.seek(place, 0)
        # All twenty are there from the start, and come with the first fetch.
        read = [[record.offset async for record in tools.read_until(reader, {place: end})] for end in (5, 12, 20)]

    assert read == [list(range(5)), list(range(5, 12)), list(range(12, 20))]
