"""`offset-map` and `reset-offsets` on real brokers: what they show, what they change, and when they refuse."""

from __future__ import annotations

import asyncio
import json
import subprocess
from datetime import UTC, datetime
from typing import Any

import aiokafka
import pytest
import yaml

from brokers import Broker
from consumer.config import load
from consumer.kafka.topics import Cluster, ClusterRefusal, Committed
from consumer.offset_map import encode
from service_process import command_line
from stages import SetStage, Stage

pytestmark = [pytest.mark.slow, pytest.mark.process]


class Bench:
    """A stage on which nothing runs yet, with the command line configured for it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.topic = stage.ledger.input
        self.path = stage.folder / "config.yaml"
        self.path.write_text(yaml.safe_dump(stage.config), encoding="utf-8")
        for number in range(10):
            for partition in (0, 1):
                stage.ledger.operate("head", f"k{number}", statuses={404}, partition=partition, wait=False)
        stage.ledger.flush()
        self.cluster = asyncio.run(self._cluster_id())

    async def _cluster_id(self) -> str:
        async with Cluster(load(self.path, {})) as cluster:
            return await cluster.cluster_id() or ""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return command_line(*arguments, "--config", str(self.path), cwd=self.stage.folder)

    def json(self, *arguments: str) -> Any:
        """Run a command that succeeds; its stdout as JSON."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def commit(self, partition: int, offset: int, metadata: str = "") -> None:
        """Commit by a bare client."""

        async def commit() -> None:
            place = aiokafka.TopicPartition(self.topic, partition)
            member = aiokafka.AIOKafkaConsumer(
                bootstrap_servers=self.stage.broker.bootstrap, group_id=self.stage.group, enable_auto_commit=False
            )
            await member.start()
            try:
                member.assign([place])
                await member.commit({place: aiokafka.OffsetAndMetadata(offset, metadata)})
            finally:
                await member.stop()

        asyncio.run(commit())

    def committed(self) -> dict[int, Committed]:
        """What the group has committed, by partition."""

        async def ask() -> dict[int, Committed]:
            async with Cluster(load(self.path, {})) as cluster:
                found = await cluster.committed(self.stage.group)
            return {partition: commit for (_, partition), commit in found.items()}

        return asyncio.run(ask())


@pytest.fixture
def bench(broker: Broker, set_stage: SetStage) -> Bench:
    """Ten records in each of two partitions, and nobody who reads them; on each broker."""
    return Bench(set_stage(broker))


class TestOffsetMap:
    """`offset-map show` and `clear`, and what `lag` says of a map."""

    def test_a_map_is_shown_decoded(self, bench: Bench) -> None:
        """Contract 7: the JSON's shape; for people a line a partition."""
        text = encode(2, [(3, 5), (7, 7)], bench.cluster)
        bench.commit(0, 2, text)
        bench.commit(1, 10)

        rows = bench.json("offset-map", "show")
        table = bench.run("offset-map", "show").stdout.splitlines()
        (mapped, plain) = bench.json("lag")

        assert rows == [
            {
                "topic": bench.topic,
                "partition": 0,
                "base": 2,
                "finished": [[3, 5], [7, 7]],
                "bytes": len(text),
                "valid": True,
                "reason": None,
            },
            {
                "topic": bench.topic,
                "partition": 1,
                "base": None,
                "finished": [],
                "bytes": 0,
                "valid": False,
                "reason": "absent",
            },
        ]
        assert table[1].split() == [bench.topic, "0", "2", "4", str(len(text)), "True", "-"]
        assert (mapped["committed"], mapped["map_bytes"], mapped["finished_above_gap"]) == (2, len(text), 4)
        assert (plain["committed"], plain["map_bytes"], plain["finished_above_gap"]) == (10, 0, 0)

    @pytest.mark.parametrize(
        ("base", "last", "cluster", "reason"),
        [(1, 5, None, "other_base"), (2, 5, "another", "other_cluster"), (2, 10, None, "beyond_log_end")],
    )
    def test_a_map_that_has_no_effect_says_why(
        self, bench: Bench, base: int, last: int, cluster: str | None, reason: str
    ) -> None:
        """Contract 3: ignored unless it belongs here."""
        bench.commit(0, 2, encode(base, [(4, last)], cluster or bench.cluster))

        (row,) = bench.json("offset-map", "show")
        assert (row["valid"], row["reason"], row["finished"]) == (False, reason, [[4, last]])
        assert bench.json("lag")[0]["finished_above_gap"] is None

    def test_of_any_group(self, bench: Bench) -> None:
        """`--group`."""
        bench.commit(0, 2)

        assert bench.json("offset-map", "show", "--group", "nobody") == []

    def test_cleared_maps_are_gone_and_offsets_stay(self, bench: Bench) -> None:
        """Contract 7: only maps; metadata of others is not ours to remove."""
        text = encode(2, [(3, 5)], bench.cluster)
        bench.commit(0, 2, text)
        bench.commit(1, 4, "a note of another tool")

        would = bench.json("offset-map", "clear", "--dry-run")
        unchanged = bench.committed()[0]
        unasked = bench.run("offset-map", "clear")
        cleared = bench.json("offset-map", "clear", "--yes")

        assert would == cleared == [{"topic": bench.topic, "partition": 0, "committed": 2, "bytes": len(text)}]
        assert unchanged == Committed(2, text)
        assert unasked.returncode == 2
        assert "--yes" in unasked.stderr
        assert bench.committed() == {0: Committed(2, ""), 1: Committed(4, "a note of another tool")}
        assert bench.run("offset-map", "clear").stdout == "0 offset maps cleared\n"


class TestResetOffsets:
    """`reset-offsets`."""

    def test_to_the_end_and_back_to_the_beginning(self, bench: Bench) -> None:
        """Contract 7: `earliest`, `latest`; clears the map; a partition without a commit gets one."""
        bench.commit(0, 2, encode(2, [(3, 5)], bench.cluster))

        rows = bench.json("reset-offsets", "--to", "latest", "--yes")
        at_the_end = bench.committed()
        bench.json("reset-offsets", "--to", "earliest", "--yes")

        assert rows == [
            {"topic": bench.topic, "partition": 0, "committed": 2, "offset": 10},
            {"topic": bench.topic, "partition": 1, "committed": None, "offset": 10},
        ]
        assert at_the_end == {0: Committed(10, ""), 1: Committed(10, "")}
        assert bench.committed() == {0: Committed(0, ""), 1: Committed(0, "")}

    def test_to_an_offset_within_the_log(self, bench: Bench) -> None:
        """Outside it the group would stand out of range; it is said where that differs from what was asked."""
        exact = bench.run("reset-offsets", "--to", "7", "--yes")
        far = bench.run("reset-offsets", "--to", "700", "--yes")

        assert (exact.returncode, far.returncode) == (0, 0)
        assert "outside" not in exact.stderr
        assert f"{bench.topic}/0: 700 is outside the log; 10 is nearest" in far.stderr
        assert bench.committed() == {0: Committed(10, ""), 1: Committed(10, "")}

    def test_to_a_time(self, bench: Bench) -> None:
        """The first record of that time or later; the end where there is none."""
        bench.json("reset-offsets", "--to", "2001-01-01T00:00:00Z", "--yes")
        early = bench.committed()[0].offset
        bench.json("reset-offsets", "--to", datetime(2100, 1, 1, tzinfo=UTC).isoformat(), "--yes")

        assert (early, bench.committed()[0].offset) == (0, 10)

    def test_a_dry_run_changes_nothing_and_nobody_is_not_asked(self, bench: Bench) -> None:
        """Contract 7: `--dry-run`; without `--yes` and without a terminal nothing happens."""
        bench.commit(0, 2)

        would = bench.json("reset-offsets", "--to", "earliest", "--dry-run")
        unasked = bench.run("reset-offsets", "--to", "earliest")

        assert [row["offset"] for row in would] == [0, 0]
        assert unasked.returncode == 2
        assert bench.committed() == {0: Committed(2, "")}

    def test_no_place_is_a_usage_error(self, bench: Bench) -> None:
        """Exit 2, with an example."""
        done = bench.run("reset-offsets", "--to", "yesterday", "--yes")

        assert done.returncode == 2
        assert "2026-01-31T12:00:00Z" in done.stderr

    def test_the_service_goes_on_where_it_was_told_to(self, bench: Bench) -> None:
        """What lies behind is not answered, what lies ahead is."""
        bench.json("reset-offsets", "--to", "6", "--yes")
        ledger = bench.stage.ledger
        ahead = [entry for entry in ledger.entries.values() if entry.offset >= 6]

        service = bench.stage.start(partitions=2)
        ledger.wait_answered(ahead)
        service.stop()
        ledger.read_all()

        assert sorted(ledger.answers) == sorted(entry.id for entry in ahead)


def test_a_group_with_members_is_left_alone(broker: Broker, set_stage: SetStage) -> None:
    """Contract 7: `reset-offsets` and `offset-map clear` exit 1 while the group is not empty; looking is allowed."""
    bench = Bench(set_stage(broker))
    service = bench.stage.start(partitions=2)
    bench.stage.ledger.wait_answered()
    service.wait(lambda: bench.stage.ledger.committed(bench.stage.group) == {0: 10, 1: 10}, "the commit")

    refused = [
        bench.run("reset-offsets", "--to", "earliest", "--yes"),
        bench.run("offset-map", "clear", "--yes"),
    ]
    shown = bench.run("offset-map", "show")
    service.stop()

    for done in refused:
        assert (done.returncode, done.stdout) == (1, "")
        assert f"error: group {bench.stage.group} is not empty" in done.stderr
        assert "hint: " in done.stderr
    assert shown.returncode == 0
    assert {commit.offset for commit in bench.committed().values()} == {10}


def test_the_broker_too_refuses_to_commit_for_a_group_with_members(apache: Broker, set_stage: SetStage) -> None:
    """A member that joins between the question and the commit must not have its offsets changed under it."""
    bench = Bench(set_stage(apache))
    service = bench.stage.start(partitions=2)

    async def commit() -> None:
        async with Cluster(load(bench.path, {})) as cluster:
            await cluster.commit(bench.stage.group, {(bench.topic, 0): Committed(0, "")})

    with pytest.raises(ClusterRefusal, match="has members"):
        asyncio.run(commit())
    service.stop()
