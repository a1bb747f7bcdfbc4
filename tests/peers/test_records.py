"""What is compared with the peers is tierstream's own work: records and responses that its codec knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench
import candidate
import pytest
import records

from consumer.codec import OperationDecoder, ResponseEncoder
from consumer.config import load
from consumer.ids import ObjectId
from consumer.operations import Insert, Inserted


class Response:
    """A response as the runner's client gives it."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def value(self) -> bytes:
        """The record's value."""
        return self._value


@pytest.mark.parametrize("number", [0, 7, 63, 64, 8191, 8192, 249_999])
def test_a_record_of_the_workload_is_an_insert_of_its_size_and_its_response_tells_its_number(number: int) -> None:
    """Else the table would compare something else, or count answers as missing."""
    key, value = records.make(number)

    decoded = OperationDecoder().decode(value, ())
    operation = decoded.operation

    assert isinstance(operation, Insert)
    assert len(value) == records.VALUE_BYTES
    assert key.decode() == operation.key == f"{number % records.KEYS:04}"
    assert operation.key is not None
    answer = Inserted(ObjectId(operation.context, operation.key), operation.metadata)
    _, response = ResponseEncoder("in-0123456789", 7).encode(number * 3, decoded, answer, 1)
    assert records.id_of(Response(response)) == number


@pytest.mark.process
def test_without_a_compiler_it_is_measured_as_it_is_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of the one form that says it was of the other would be worse than none."""
    monkeypatch.setenv("CC", "no-such-compiler")

    assert bench.compile_tierstream(tmp_path) is False
    assert "measured uncompiled: TIERSTREAM_COMPILE=1 needs a C compiler" in capsys.readouterr().out


@pytest.mark.parametrize("name", bench.CANDIDATES)
def test_a_candidate_is_a_configuration_of_the_service(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With everything the service does; what differs between candidates stands in their list."""
    given = {"BOOTSTRAP": "127.0.0.1:1", "GROUP": "g", "INPUT": "i", "OUTPUT": "o"}
    given |= {"LATENCY_MS": "5", "CONCURRENCY": "500"}
    file = tmp_path_factory.mktemp("candidate") / "c.json"
    file.write_text(json.dumps(candidate.settings(given, bench.CANDIDATES[name][1:])), encoding="utf-8")

    config = load(file)

    assert config.window.policy == "equal-share"
    assert getattr(config.storage.high_volume, "latency", None) == 0.005


class TestThePage:
    """``docs/benchmarks.md`` says what the runner found."""

    def row(self, peer: str, latency: int, rate: float, **more: Any) -> dict[str, Any]:
        """What the runner sums up of one peer."""
        return {
            "peer": peer,
            "latency_ms": latency,
            "throughput_median": rate,
            "throughput_min": rate - 1000,
            "throughput_max": rate + 1000,
            "throughput_second_half_median": rate + 10,
            "cpu_s_per_100k": 2.5,
            "max_rss_mb": 150.0,
            "duplicates": 0,
            "lost": 0,
            "out_of_order": 0,
            "foreign_cores": 0.01,
            "ends": ["complete"],
            **more,
        }

    def page(self, *rows: dict[str, Any]) -> str:
        """The page of these rows."""
        meta = {"runs": 3, "partitions": 8, "value_bytes": 1024, "keys": 1000, "concurrency": 500, "cores": 2}
        return bench.page({"meta": {**meta, "started": "now"}, "summary": list(rows)}, ["* a machine"])

    def test_each_row_stands_under_its_latency_with_everything_that_was_counted(self) -> None:
        """Lost and repeated records too: a fast loss is no speed."""
        lossy = self.row("faust", 5, 2000, lost=3, duplicates=7, ends=["time limit 120 s"], out_of_order=None)
        page = self.page(self.row("tierstream-key", 0, 40000), lossy)

        assert "* a machine" in page
        first, second = page.split("## Operations of 5 ms")
        assert "| tierstream-key | 40,000 | 39,000 - 41,000 | 40,010 | 2.50 | 150 | 0 | 0 | 0 | 0.01 |" in first
        assert "| faust (time limit 120 s) | 2,000 | 1,000 - 3,000 | 2,010 | 2.50 | 150 | 7 | 3 | - | 0.01 |" in second

    def test_goals_are_said_beside_what_came_of_them_and_a_missed_one_is_named(self) -> None:
        """Of the same latency only; nothing is said where a row is not there."""
        page = self.page(
            self.row("tierstream-unordered", 0, 50000),
            self.row("aiokafka-sendbatch-uvloop", 0, 100000),
            self.row("tierstream-unordered", 5, 30000, cpu_s_per_100k=2.0),
            self.row("aiokafka-sendbatch-uvloop", 5, 50000),
            self.row("pc-unordered", 5, 29000, cpu_s_per_100k=8.0, max_rss_mb=500.0),
        )

        assert "| rate over the `send_batch` loop's | ≥ 0.95 | 5 ms: 0.60 **missed** |" in page
        assert "| rate over the `send_batch` loop's | ≥ 0.33 | 0 ms: 0.50 |" in page
        assert "| unordered: CPU over Parallel Consumer's | ≤ 0.6 | 5 ms: 0.25 |" in page
        assert "| unordered: memory over Parallel Consumer's | ≤ 0.2 | 5 ms: 0.30 **missed** |" in page
        assert "Quix" not in page

    def test_every_goal_is_about_rows_that_are_run(self) -> None:
        """A name that is misspelt would make its goal silent for ever."""
        for goal in bench.GOALS:
            assert {goal.of, goal.over} <= {*bench.CANDIDATES, *bench.PEERS}
            assert (goal.at_least is None) != (goal.at_most is None)


def test_members_share_the_permits() -> None:
    """500 in all, as every peer has."""
    given = {"BOOTSTRAP": "b", "GROUP": "g", "INPUT": "i", "OUTPUT": "o", "LATENCY_MS": "0", "CONCURRENCY": "500"}

    assert candidate.settings(given, [], 2)["concurrency"] == {"limit": 250}
