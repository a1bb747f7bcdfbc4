"""One state and one set of metrics out of those of several processes: what an operator sees is one service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from consumer.metrics import (
    Collected,
    Counts,
    Distribution,
    EventLoopLag,
    Exemplar,
    PlainFamily,
    families_of,
    new_registry,
    plain,
    register,
)
from consumer.permits import ConcurrencyLimiter
from consumer.processes.merge import Run, Tally, combined, merged_state

FIRST: Run = (1, 1)
SECOND: Run = (2, 2)
AGAIN: Run = (1, 3)
"""Process 1, started again."""

EMPTY: Mapping[str, Any] = {
    "limiter": {"limit": 0, "in_use": 0, "available": 0, "queued": 0},
    "totals": Counts().totals(),
    "storage": {"high_volume": "sqlite"},
}


def partition(number: int, topic: str = "operations", **known: Any) -> dict[str, Any]:
    """One entry of ``partitions``."""
    return {
        "topic": topic,
        "partition": number,
        "epoch": 1,
        "window": 50,
        "in_flight": 5,
        "buffered": 0,
        "position": 10,
        "committed": 5,
        "lowest_unfinished": 6,
        "finished_above_gap": 1,
        "high_watermark": 20,
        "lag": 14,
        "paused_for": [],
        "oldest": None,
        **known,
    }


def state(*partitions: dict[str, Any], **known: Any) -> dict[str, Any]:
    """The ``/debug/state`` of one process."""
    return {
        "state": "running",
        "limiter": {"limit": 500, "in_use": 50 * len(partitions), "available": 500 - 50 * len(partitions), "queued": 1},
        "partitions": list(partitions),
        "totals": {**Counts().totals(), "records": 10, "responses": 9},
        "storage": {"high_volume": "sqlite", "change_log_entries": 2, "blocked": False},
        "in_flight_bytes": 1000,
        "last_errors": [],
        **known,
    }


class Process:
    """One process, as far as its metrics go."""

    def __init__(self, *partitions: dict[str, Any]) -> None:
        self.counts = Counts()
        self.limiter = ConcurrencyLimiter(500)
        self.partitions = list(partitions)
        self._registry = new_registry()
        register(self._registry, self.counts, self.limiter, self._snapshot, loop_lag=EventLoopLag(), version="1.2.3")

    def _snapshot(self) -> dict[str, Any]:
        return state(*self.partitions)

    def told(self) -> list[PlainFamily]:
        """Its metrics, as they come over the line."""
        return [PlainFamily(**family) for family in orjson.loads(orjson.dumps(plain(self._registry.collect())))]


def samples(families: list[PlainFamily]) -> dict[str, float]:
    """The samples of an exposition, by name and labels, as an independent parser reads them."""
    text = generate_latest(Exposed(families)).decode()
    return {
        sample.name + "".join(f"|{label}" for label in sample.labels.values()): sample.value
        for family in parse(text)
        for sample in family.samples
    }


class Exposed:
    """Families in the form of the registry that encoders ask for them."""

    def __init__(self, families: list[PlainFamily]) -> None:
        self._families = families

    def collect(self) -> Collected:
        return families_of(self._families)


class TestState:
    """``/debug/state`` of all, in the shape of each."""

    def test_partitions_are_concatenated_in_their_order_and_the_rest_is_summed(self) -> None:
        first = state(partition(10), partition(0, topic="others"))
        second = state(partition(9), partition(2))

        merged = merged_state({2: second, 1: first}, "running", EMPTY)

        assert [(entry["topic"], entry["partition"]) for entry in merged["partitions"]] == [
            ("operations", 2),
            ("operations", 9),
            ("operations", 10),
            ("others", 0),
        ]
        assert merged["partitions"][0] == second["partitions"][1], "no entry is changed"
        assert merged["limiter"] == {"limit": 1000, "in_use": 200, "available": 800, "queued": 2}
        assert (merged["totals"]["records"], merged["totals"]["responses"]) == (20, 18)
        assert merged["storage"] == {"high_volume": "sqlite", "change_log_entries": 4, "blocked": False}
        assert merged["in_flight_bytes"] == 2000
        assert list(merged) == list(state()), "one process or many: the same shape"

    @pytest.mark.parametrize(
        ("least", "one", "other", "worst"),
        [
            ("running", "running", "running", "running"),
            ("running", "running", "rebalancing", "rebalancing"),
            ("running", "starting", "rebalancing", "starting"),
            ("starting", "running", "running", "starting"),
            ("running", "starting", "draining", "draining"),
            ("draining", "running", "running", "draining"),
            ("draining", "stopped", "draining", "stopped"),
        ],
    )
    def test_the_state_is_the_worst(self, least: str, one: str, other: str, worst: str) -> None:
        assert merged_state({1: state(state=one), 2: state(state=other)}, least, EMPTY)["state"] == worst

    def test_the_newest_errors_of_all_are_shown_in_their_order(self) -> None:
        def errors(*seconds: int) -> list[dict[str, Any]]:
            return [{"timestamp": f"2026-01-01T00:00:{second:02}Z", "event": str(second)} for second in seconds]

        told = {1: state(last_errors=errors(*range(0, 30, 3))), 2: state(last_errors=errors(2, 50))}

        merged = merged_state(told, "running", {**EMPTY, "last_errors": errors(40)})

        assert [error["event"] for error in merged["last_errors"]] == [*map(str, range(6, 30, 3)), "40", "50"]

    def test_where_nobody_answers_the_shape_remains(self) -> None:
        merged = merged_state({}, "starting", EMPTY)

        assert merged == {**EMPTY, "state": "starting", "partitions": [], "last_errors": []}
        assert next(iter(merged)) == "state"

    def test_what_is_empty_adds_the_totals_of_those_that_are_gone(self) -> None:
        gone = {**EMPTY, "totals": {**Counts().totals(), "records": 100}}

        assert merged_state({1: state()}, "running", gone)["totals"]["records"] == 110

    @pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
    def test_of_two_owners_of_a_partition_the_one_that_read_further_is_believed(self, numbers: tuple[int, int]) -> None:
        """One was frozen, and has not heard yet that its partition belongs to the other."""
        late, present = state(partition(0, position=100)), state(partition(0, position=300))

        merged = merged_state(dict(zip(numbers, (late, present), strict=True)), "running", EMPTY)

        assert [entry["position"] for entry in merged["partitions"]] == [300]

    def test_an_owner_that_does_not_know_its_position_yet_is_believed_last(self) -> None:
        merged = merged_state(
            {1: state(partition(0, position=None)), 2: state(partition(0, position=0))}, "running", EMPTY
        )

        assert [entry["position"] for entry in merged["partitions"]] == [0]

    @pytest.mark.parametrize(
        ("values", "together"),
        [
            ([1, None, 2.5], 3.5),
            ([None, None], None),
            ([False, True], True),
            ([False, None], False),
            (["sqlite", "sqlite"], "sqlite"),
            ([{"a": 1}, {"a": 2, "b": {"c": True}}], {"a": 3, "b": {"c": True}}),
        ],
    )
    def test_values_of_one_name_are_combined_by_their_kind(self, values: list[Any], together: Any) -> None:
        assert combined(values) == together


class TestMetrics:
    """``/metrics`` of all, in the names and labels of each (contract 9)."""

    def test_one_process_is_shown_as_it_is(self) -> None:
        process = Process(partition(0))
        process.counts.commits["success"] = 3
        process.counts.response_latency.observe(0.3)
        told = process.told()

        assert samples(Tally().merged({FIRST: told})) == samples(told)

    def test_counters_are_summed(self) -> None:
        first, second = Process(), Process()
        first.counts.responses["get", 200] = 5
        second.counts.responses["get", 200] = 7
        second.counts.responses["get", 404] = 1

        merged = samples(Tally().merged({FIRST: first.told(), SECOND: second.told()}))

        assert merged["tierstream_responses_total|get|200"] == 12
        assert merged["tierstream_responses_total|get|404"] == 1

    def test_of_exemplars_the_newest_is_shown(self) -> None:
        """One record for a bucket, of whichever process; the rest of it is as each of them tells it."""
        first, second = Process(), Process()
        for process, offset, value, at in ((first, 1, 0.2, 50.5), (second, 2, 0.2, 70.25), (second, 3, 0.7, 60.0)):
            latency = process.counts.response_latency
            latency.observe(value)
            latency.exemplify(Exemplar({"offset": str(offset)}, value, at))

        merged = Exposed(Tally().merged({FIRST: first.told(), SECOND: second.told()}))
        text = generate_openmetrics(merged).decode()  # type: ignore[no-untyped-call]  # the vendor's

        assert [line.partition(" # ")[2] for line in text.splitlines() if " # {" in line] == [
            '{offset="2"} 0.2 70.25',
            '{offset="3"} 0.7 60.0',
        ]
        assert list(parse_openmetrics(text))  # type: ignore[no-untyped-call]  # the vendor's

    def test_histograms_are_summed_bucket_by_bucket(self) -> None:
        first, second, both = Process(), Process(), Distribution(Counts().response_latency.bounds)
        for process, seconds in ((first, 0.003), (first, 0.2), (second, 0.2), (second, 9999.0)):
            process.counts.response_latency.observe(seconds)
            both.observe(seconds)
        expected = Process()
        expected.counts.response_latency = both

        merged = samples(Tally().merged({FIRST: first.told(), SECOND: second.told()}))

        name = "tierstream_response_latency_seconds"
        histogram = {series: value for series, value in merged.items() if series.startswith(name)}
        assert histogram == {
            series: value for series, value in samples(expected.told()).items() if series.startswith(name)
        }
        assert histogram[f"{name}_count"] == 4

    def test_gauges_of_processes_are_summed_and_partitions_stand_beside_each_other(self) -> None:
        first, second = Process(partition(0, lag=3), partition(1)), Process(partition(2, lag=4))
        with first.limiter.acquire_many_nowait(100):
            merged = samples(Tally().merged({FIRST: first.told(), SECOND: second.told()}))

        assert merged["tierstream_concurrency_limit"] == 1000
        assert merged["tierstream_concurrency_in_use"] == 100
        assert merged["tierstream_assigned_partitions"] == 3
        assert merged["tierstream_partition_lag|0|operations"] == 3
        assert merged["tierstream_partition_lag|2|operations"] == 4
        assert merged["tierstream_window_utilization_ratio|2|operations"] == 0.1
        assert merged["tierstream_partition_paused|1|bytes|operations"] == 0

    def test_what_a_sum_would_falsify_is_not_summed(self) -> None:
        def told(lag: float, start: float) -> list[PlainFamily]:
            gauges = {"tierstream_event_loop_lag_seconds": lag, "process_start_time_seconds": start}
            return [PlainFamily(name, "gauge", "", [(name, {}, value, None)]) for name, value in gauges.items()]

        merged = samples(Tally().merged({FIRST: told(0.1, 1000.0), SECOND: told(0.3, 900.0)}))

        assert merged == {"tierstream_event_loop_lag_seconds": 0.3, "process_start_time_seconds": 900.0}

    def test_the_build_is_told_once(self) -> None:
        merged = Tally().merged({FIRST: Process().told(), SECOND: Process().told()})

        (build,) = (family for family in merged if family.name == "tierstream_build_info")
        ((_, labels, value, _),) = build.samples
        assert (labels["version"], value) == ("1.2.3", 1)

    def test_a_process_that_dies_takes_nothing_out_of_the_sums(self) -> None:
        """A counter that falls would be taken for one that began again at zero, and the rest for an increase."""
        tally, first, second = Tally(), Process(), Process()
        first.counts.commits["success"], second.counts.commits["success"] = 100, 10
        first.counts.commit_seconds.observe(1.0)
        tally.merged({FIRST: first.told(), SECOND: second.told()})

        tally.ended(FIRST)
        while_gone = samples(tally.merged({SECOND: second.told()}))
        restarted = Process()
        restarted.counts.commits["success"] = 1
        afterwards = samples(tally.merged({AGAIN: restarted.told(), SECOND: second.told()}))
        tally.ended(AGAIN)
        once_more = samples(tally.merged({SECOND: second.told()}))

        assert while_gone["tierstream_commits_total|success"] == 110
        assert while_gone["tierstream_commit_duration_seconds_count"] == 1
        assert afterwards["tierstream_commits_total|success"] == 111
        assert once_more["tierstream_commits_total|success"] == 111

    def test_a_process_that_does_not_answer_keeps_its_counts_and_loses_its_gauges(self) -> None:
        tally, first, second = Tally(), Process(partition(0)), Process(partition(1))
        first.counts.commits["success"], second.counts.commits["success"] = 100, 10
        tally.merged({FIRST: first.told(), SECOND: second.told()})

        silent = samples(tally.merged({SECOND: second.told()}))
        first.counts.commits["success"] = 105
        again = samples(tally.merged({FIRST: first.told(), SECOND: second.told()}))

        assert silent["tierstream_commits_total|success"] == 110
        assert silent["tierstream_concurrency_limit"] == 500
        assert "tierstream_partition_lag|0|operations" not in silent
        assert "tierstream_partition_lag|1|operations" in silent
        assert again["tierstream_commits_total|success"] == 115

    def test_a_partition_that_moves_goes_on_counting_where_it_was(self) -> None:
        tally, first, second = Tally(), Process(partition(0)), Process()
        first.counts.partition("operations", 0).operations = 100
        tally.merged({FIRST: first.told(), SECOND: second.told()})

        first.partitions, second.partitions = [], [partition(0)]
        second.counts.partition("operations", 0).operations = 5
        moved = samples(tally.merged({FIRST: first.told(), SECOND: second.told()}))

        assert moved["tierstream_records_total|0|operation|operations"] == 105
        assert moved["tierstream_assigned_partitions"] == 1

    def test_a_partition_that_nobody_owns_is_not_shown(self) -> None:
        """Contract 9: partition series disappear on revocation."""
        tally, process = Tally(), Process(partition(0))
        process.counts.partition("operations", 0).operations = 100
        tally.merged({FIRST: process.told()})

        process.partitions = []
        revoked = samples(tally.merged({FIRST: process.told()}))
        tally.ended(FIRST)
        gone = samples(tally.merged({AGAIN: Process().told()}))

        for shown in (revoked, gone):
            assert not [name for name in shown if "|0|" in name]

    @pytest.mark.parametrize("runs", [(FIRST, SECOND), (SECOND, FIRST)])
    def test_of_two_owners_of_a_partition_the_one_that_read_further_is_shown(self, runs: tuple[Run, Run]) -> None:
        late, present = Process(partition(0, position=100, lag=500)), Process(partition(0, position=300, lag=7))

        merged = samples(Tally().merged({runs[0]: late.told(), runs[1]: present.told()}))

        assert merged["tierstream_partition_position|0|operations"] == 300
        assert merged["tierstream_partition_lag|0|operations"] == 7

    def test_nobody_answers_and_what_was_counted_is_still_told(self) -> None:
        tally, process = Tally(), Process()
        process.counts.commits["success"] = 3
        tally.merged({FIRST: process.told()})

        assert samples(tally.merged({}))["tierstream_commits_total|success"] == 3

    def test_both_formats_take_what_was_merged(self) -> None:
        first, second = Process(partition(0)), Process(partition(1))
        first.counts.commit_seconds.observe(1.0)
        merged = Tally().merged({FIRST: first.told(), SECOND: second.told()})
        exposed = Exposed(merged)

        text = generate_openmetrics(exposed).decode()  # type: ignore[no-untyped-call]  # not typed in part

        told = {family.name: family for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]  # as above
        assert told["tierstream_commits"].type == "counter"
        assert told["tierstream_commit_duration_seconds"].type == "histogram"
        assert [family.name for family in merged] == [family.name for family in first.told()], "in the same order"
        assert told["tierstream_partition_lag"].documentation.startswith("Records not yet finished")
