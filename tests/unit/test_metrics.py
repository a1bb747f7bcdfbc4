"""What is counted in plain numbers comes out as the public metrics: complete, bounded, and true of this moment."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from consumer import metrics
from consumer.metrics import (
    Counts,
    DebugState,
    Distribution,
    EventLoopLag,
    Exemplar,
    OldestState,
    PartitionState,
    record_labels,
)

CANARY = "CANARY-object-key"

CONTRACT = {
    "tierstream_concurrency_limit": set(),
    "tierstream_concurrency_in_use": set(),
    "tierstream_concurrency_available": set(),
    "tierstream_concurrency_queued": set(),
    "tierstream_concurrency_rejected_total": set(),
    "tierstream_permits_acquired_total": set(),
    "tierstream_permits_released_total": set(),
    "tierstream_window_permits": {"topic", "partition"},
    "tierstream_window_in_flight": {"topic", "partition"},
    "tierstream_window_utilization_ratio": {"topic", "partition"},
    "tierstream_window_reservations_total": {"outcome"},
    "tierstream_window_reservation_wait_seconds": set(),
    "tierstream_operations_started_total": {"kind"},
    "tierstream_operation_duration_seconds": {"kind", "outcome"},
    "tierstream_records_total": {"topic", "partition", "result"},
    "tierstream_poison_records_total": {"code"},
    "tierstream_dead_letters_total": {"code"},
    "tierstream_responses_total": {"kind", "status"},
    "tierstream_response_latency_seconds": set(),
    "tierstream_partition_position": {"topic", "partition"},
    "tierstream_partition_committed_offset": {"topic", "partition"},
    "tierstream_partition_lowest_unfinished_offset": {"topic", "partition"},
    "tierstream_partition_high_watermark": {"topic", "partition"},
    "tierstream_partition_lag": {"topic", "partition"},
    "tierstream_partition_oldest_in_flight_seconds": {"topic", "partition"},
    "tierstream_partition_finished_above_gap": {"topic", "partition"},
    "tierstream_partition_offset_map_bytes": {"topic", "partition"},
    "tierstream_partition_last_commit_timestamp_seconds": {"topic", "partition"},
    "tierstream_partition_paused": {"topic", "partition", "reason"},
    "tierstream_assigned_partitions": set(),
    "tierstream_rebalances_total": {"outcome"},
    "tierstream_rebalance_drain_seconds": set(),
    "tierstream_commit_duration_seconds": set(),
    "tierstream_commits_total": {"outcome"},
    "tierstream_offset_maps_dropped_total": {"reason"},
    "tierstream_storage_request_duration_seconds": {"tier", "operation", "outcome"},
    "tierstream_storage_retries_total": {"tier", "operation"},
    "tierstream_storage_conflicts_total": {"tier", "operation"},
    "tierstream_storage_bytes_total": {"tier", "direction"},
    "tierstream_change_log_entries": set(),
    "tierstream_in_flight_bytes": set(),
    "tierstream_event_loop_lag_seconds": set(),
    "tierstream_orphans_removed_total": set(),
    "tierstream_build_info": {"version", "python"},
}
"""Contract 9, typed in again: names and labels are public."""

HISTOGRAM_PARTS = ("_bucket", "_count", "_sum")

LIMITER = SimpleNamespace(
    limit=500, in_use=50, available=450, queued=0, rejected=3, acquired_total=150, released_total=100
)


def a_partition(partition: int = 0, **changes: Any) -> PartitionState:
    """Describe a partition that is at work."""
    oldest: OldestState = {
        "offset": 120,
        "kind": "insert",
        "key_digest": CANARY,
        "attempts": 2,
        "age_seconds": 1.5,
        "last_error": CANARY,
        "last_error_message": CANARY,
    }
    state: PartitionState = {
        "topic": "operations",
        "partition": partition,
        "epoch": 1,
        "window": 50,
        "in_flight": 20,
        "buffered": 100,
        "position": 240,
        "committed": 110,
        "lowest_unfinished": 120,
        "finished_above_gap": 7,
        "high_watermark": 1000,
        "lag": 880,
        "paused_for": [],
        "oldest": oldest,
        "last_commit_timestamp": 1.7e9,
        "offset_map_bytes": 64,
    }
    return cast("PartitionState", {**state, **changes})


@dataclass
class Service:
    """A service as a scrape sees it, with everything in reach."""

    counts: Counts = field(default_factory=Counts)
    partitions: list[PartitionState] = field(default_factory=list)
    in_flight_bytes: int | None = 4096
    storage: dict[str, Any] = field(default_factory=lambda: {"change_log_entries": 2})
    snapshots: int = 0

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lag = EventLoopLag()
        metrics.register(self.registry, self.counts, LIMITER, self.snapshot, loop_lag=self.lag, version="0.1.0")

    def snapshot(self) -> DebugState:
        self.snapshots += 1
        return {
            "state": "running",
            "limiter": {"limit": 500, "in_use": 50, "available": 450, "queued": 0},
            "partitions": self.partitions,
            "totals": self.counts.totals(),
            "storage": self.storage,
            "in_flight_bytes": self.in_flight_bytes,
        }

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in parse(generate_latest(self.registry).decode())
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """One sample, None where there is none."""
        return self.samples().get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def service() -> Service:
    """A service that has done nothing yet."""
    return Service()


def be_busy(service: Service) -> None:
    """Do everything there is to count, once or more."""
    counts = service.counts
    service.partitions = [a_partition(0), a_partition(1, paused_for=["bytes"])]
    counts.partition("operations", 0).operations += 5
    counts.partition("operations", 0).poison += 1
    counts.poison["decode_error"] += 1
    counts.dead_letters["decode_error"] += 1
    for operation in counts.operations.values():
        operation.started += 2
        operation.success.observe(0.003)
        operation.error.observe(30.0)
    counts.responses["insert", 201] += 3
    counts.responses["get", 404] += 1
    counts.responses["unknown", 400] += 1
    counts.response_latency.observe(0.25)
    counts.reserved(0.01)
    counts.reservations["at_capacity"] += 1
    counts.committed("success", 0.004)
    counts.committed("unknown", 5.0)
    counts.drained("drained", 0.5)
    requests = counts.requests("high_volume", "compare_and_write")
    requests.success.observe(0.001)
    requests.error.observe(20.0)
    requests.retries += 1
    requests.conflicts += 1
    counts.storage_bytes["long_term", "write"] += 2_000_000
    counts.orphans_removed += 1
    counts.offset_maps_dropped["too_large"] += 1
    service.lag._lags.append(0.002)


def openmetrics(service: Service) -> str:
    """Scrape in the strict format."""
    encode, _ = choose_encoder("application/openmetrics-text")
    return encode(service.registry).decode()


def families(service: Service) -> Iterator[Metric]:
    """Parse a scrape in the strict format."""
    parsed: Iterator[Metric] = parse_openmetrics(openmetrics(service))  # type: ignore[no-untyped-call]  # the vendor's
    return parsed


def test_the_catalogue_has_the_names_types_and_labels_of_the_contract() -> None:
    """Contract 9. A missing, renamed or relabelled metric breaks dashboards and alerts outside this repository."""
    assert {name: set(definition.labels) for name, definition in metrics.CATALOGUE.items()} == CONTRACT
    for name, definition in metrics.CATALOGUE.items():
        assert (definition.kind == "counter") == name.endswith("_total"), name


def test_every_metric_has_a_text_that_goes_beyond_its_name() -> None:
    """Style 7.13: whoever is on call reads the help text; no text stands on two metrics."""
    texts = [definition.text for definition in metrics.CATALOGUE.values()]

    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) >= 8 and text.endswith(".") for text in texts)


def test_after_activity_a_scrape_has_every_metric_of_the_contract(service: Service) -> None:
    """MET-1 … MET-7, MET-8, MET-12 in this program's names, with exactly the labels they are promised with."""
    be_busy(service)

    seen: dict[str, set[str]] = {}
    for name, labels in service.samples():
        base = next((name.removesuffix(part) for part in HISTOGRAM_PARTS if name.removesuffix(part) in CONTRACT), name)
        seen[base] = {label for label, _ in labels} - {"le"}

    assert {name: labels for name, labels in seen.items() if name.startswith("tierstream_")} == CONTRACT


def test_the_exposition_is_valid_in_the_strict_format_too(service: Service) -> None:
    """The OpenMetrics parser refuses bad names, unordered buckets and counters that are none."""
    be_busy(service)

    types = {family.name: family.type for family in families(service)}

    for name, definition in metrics.CATALOGUE.items():
        assert types[name.removesuffix("_total")] == definition.kind


def test_exemplars_are_shown_where_the_format_has_them(service: Service) -> None:
    """Contract 9: from a slow bucket to the record that was slow; plain text has no place for it."""
    latency = service.counts.response_latency
    for value in (0.2, 0.21, 100_000.0):
        latency.observe(value)
        latency.exemplify(Exemplar({"topic": "operations", "partition": "3", "offset": "1842"}, value, 1.7e9))

    found = {
        sample.labels["le"]: (sample.exemplar.labels, sample.exemplar.value, float(sample.exemplar.timestamp or 0))
        for family in families(service)
        for sample in family.samples
        if sample.exemplar is not None
    }
    text = generate_latest(service.registry).decode()

    labels = {"topic": "operations", "partition": "3", "offset": "1842"}
    assert found == {"0.25": (labels, 0.21, 1.7e9), "+Inf": (labels, 100_000.0, 1.7e9)}
    assert "1842" not in text
    assert list(parse(text))


def test_a_bucket_asks_for_a_record_once_in_a_while() -> None:
    """Every value is counted, few are asked about; each bucket by itself, and who has no record asks in vain."""
    distribution = Distribution((1.0, 2.0))
    asked: list[int | None] = []

    def labels_of(index: int | None) -> Mapping[str, str] | None:
        asked.append(index)
        return None if index is None else {"offset": str(index)}

    observe = distribution.observe_of_record
    observe(0.5, 100.0, 1)
    assert distribution.exemplars == {}, "nobody has records here"
    token = metrics.record_at_work.set(labels_of)
    try:
        observe(0.5, 100.9, 2)
        observe(1.5, 100.9, 3)
        observe(0.6, 101.0, 4)
        observe(0.7, 101.9, 5)
        observe(9.0, 101.9)
    finally:
        metrics.record_at_work.reset(token)

    assert asked == [3, 4, None]
    assert {bucket: (one.labels["offset"], one.value) for bucket, one in distribution.exemplars.items()} == {
        0: ("4", 0.6),
        1: ("3", 1.5),
    }
    assert (distribution.buckets, distribution.count) == ([4, 1, 1], 6)


@pytest.mark.parametrize("topic", ["operations", "t" * 249])
@pytest.mark.parametrize("offset", [0, 2**63 - 1])
@pytest.mark.parametrize("traced", [True, False])
def test_what_an_exemplar_says_fits_whatever_the_record_is(topic: str, offset: int, traced: bool) -> None:
    """OpenMetrics: 128 characters in all; one more, and a scraper may refuse everything. The topic gives way."""
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = [("other", b"x"), ("traceparent", f"00-{trace_id}-b7ad6b7169203331-01".encode())]

    labels = record_labels(topic, 2**31 - 1, offset, headers if traced else [("traceparent", b"no"), ("a", None)])

    assert sum(len(name) + len(value) for name, value in labels.items()) <= 128
    assert (labels["partition"], labels["offset"]) == (str(2**31 - 1), str(offset))
    assert topic.startswith(labels["topic"])
    assert len(labels["topic"]) >= min(len(topic), 30)
    assert labels.get("trace_id") == (trace_id if traced else None)


def test_no_creation_times_are_exposed(service: Service) -> None:
    """They would double the series of every counter; the process start time says the same once."""
    be_busy(service)

    assert not [name for name, _ in service.samples() if name.endswith("_created")]
    assert "_created" not in openmetrics(service)


def test_values_come_out_where_they_were_put(service: Service) -> None:
    """Each number is read back under its public name."""
    be_busy(service)
    value = service.value

    assert value("tierstream_concurrency_in_use") == 50
    assert value("tierstream_concurrency_rejected_total") == 3
    assert value("tierstream_permits_acquired_total") == 150
    assert value("tierstream_assigned_partitions") == 2
    assert value("tierstream_records_total", topic="operations", partition="0", result="operation") == 5
    assert value("tierstream_records_total", topic="operations", partition="0", result="poison") == 1
    assert value("tierstream_responses_total", kind="insert", status="201") == 3
    assert value("tierstream_operation_duration_seconds_count", kind="get", outcome="error") == 1
    assert value("tierstream_operation_duration_seconds_sum", kind="get", outcome="error") == 30.0
    assert value("tierstream_window_utilization_ratio", topic="operations", partition="0") == 0.4
    assert value("tierstream_partition_lowest_unfinished_offset", topic="operations", partition="0") == 120
    assert value("tierstream_partition_oldest_in_flight_seconds", topic="operations", partition="0") == 1.5
    assert value("tierstream_commits_total", outcome="unknown") == 1
    assert value("tierstream_commit_duration_seconds_count") == 2
    assert value("tierstream_rebalances_total", outcome="drained") == 1
    assert value("tierstream_window_reservations_total", outcome="granted") == 1
    assert value("tierstream_storage_bytes_total", tier="long_term", direction="write") == 2_000_000
    assert value("tierstream_change_log_entries") == 2
    assert value("tierstream_in_flight_bytes") == 4096
    assert value("tierstream_event_loop_lag_seconds") == 0.002
    assert (value("process_resident_memory_bytes") or 0) > 0
    names = {name: labels for name, labels in service.samples() if name == "tierstream_build_info"}
    assert dict(names["tierstream_build_info"])["version"] == "0.1.0"


def test_series_that_can_be_known_beforehand_start_at_zero(service: Service) -> None:
    """An alert on the increase of a counter misses the first event if the series only begins with it."""
    for outcome in ("success", "lost", "unknown"):
        assert service.value("tierstream_commits_total", outcome=outcome) == 0
    for outcome in ("drained", "timeout", "lost"):
        assert service.value("tierstream_rebalances_total", outcome=outcome) == 0
    for kind in metrics.KINDS:
        assert service.value("tierstream_operations_started_total", kind=kind) == 0
    assert service.value("tierstream_window_reservations_total", outcome="at_capacity") == 0


def test_the_series_of_a_revoked_partition_are_gone_and_come_back_where_they_were(service: Service) -> None:
    """Contract 9: a gauge of a partition that others own would be a lie; a counter that falls would be a restart."""
    be_busy(service)
    partition = ("topic", "operations"), ("partition", "0")

    def of_partition() -> set[str]:
        return {name for name, labels in service.samples() if set(partition) <= set(labels)}

    owned = of_partition()
    service.partitions = []
    revoked = of_partition()
    service.partitions = [a_partition(0)]
    again = service.counts.partition("operations", 0)

    assert "tierstream_partition_lag" in owned
    assert "tierstream_records_total" in owned
    assert not revoked
    assert of_partition() == owned
    assert again.operations == 5


def test_an_unknown_number_has_no_sample(service: Service) -> None:
    """Contract 8, 9: a lag of 0 for a partition whose end nobody knows would silence the alert."""
    unknown: dict[str, Any] = dict.fromkeys(
        (
            "window",
            "position",
            "committed",
            "lowest_unfinished",
            "finished_above_gap",
            "high_watermark",
            "lag",
            "oldest",
        )
    )
    service.partitions = [a_partition(0, **unknown, last_commit_timestamp=None, offset_map_bytes=None)]
    service.in_flight_bytes = None
    service.storage = {}

    names = {name for name, labels in service.samples() if ("partition", "0") in labels}

    assert names == {"tierstream_window_in_flight", "tierstream_records_total", "tierstream_partition_paused"}
    for name in ("tierstream_in_flight_bytes", "tierstream_change_log_entries", "tierstream_event_loop_lag_seconds"):
        assert service.value(name) is None


def test_a_window_without_permits_has_no_utilization(service: Service) -> None:
    """A partition that waits for permits has a window of 0; nothing is divided by it."""
    service.partitions = [a_partition(0, window=0, in_flight=0)]

    assert service.value("tierstream_window_utilization_ratio", topic="operations", partition="0") is None
    assert service.value("tierstream_window_permits", topic="operations", partition="0") == 0


def test_every_pause_reason_is_a_series_of_its_own(service: Service) -> None:
    """Contract 8, 9: one series for each partition and reason, 1 only for what holds now."""
    service.partitions = [a_partition(0), a_partition(1, paused_for=["bytes", "output"])]

    paused = {labels: value for (name, labels), value in service.samples().items() if name.endswith("_paused")}

    assert len(paused) == 2 * len(metrics.PAUSE_REASONS) == 18
    reasons = {(dict(labels)["partition"], dict(labels)["reason"]) for labels, value in paused.items() if value}
    assert reasons == {("1", "bytes"), ("1", "output")}


def test_no_key_and_no_text_of_an_error_is_a_label(service: Service) -> None:
    """MET-13 is deliberately left out, and nothing of an object is in a label: their number has no bound."""
    be_busy(service)

    assert CANARY not in generate_latest(service.registry).decode()


def test_labels_stay_bounded_whatever_is_counted(service: Service) -> None:
    """A thousand operations more add no series."""
    be_busy(service)
    before = len(service.samples())

    for _ in range(1000):
        be_busy(service)

    assert len(service.samples()) == before


def test_a_second_registration_is_refused_without_a_snapshot(service: Service) -> None:
    """One registry has each metric once; finding that out asks nothing of the service."""
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.register(service.registry, service.counts, LIMITER, service.snapshot)

    assert service.snapshots == 0


def test_two_services_share_nothing() -> None:
    """One registry, passed in: two services of one process (as in tests) do not see each other."""
    one, two = Service(), Service()
    one.counts.responses["get", 200] += 1

    assert one.value("tierstream_responses_total", kind="get", status="200") == 1
    assert two.value("tierstream_responses_total", kind="get", status="200") is None


def test_the_release_is_found_by_itself(service: Service) -> None:
    """`build_info` says something also where nobody passed a version."""
    registry = CollectorRegistry()
    metrics.register(registry, service.counts, LIMITER, service.snapshot)

    assert re.search(
        r'tierstream_build_info\{python="3\.\d+\.\S+",version="[^"]+"\} 1\.0', generate_latest(registry).decode()
    )


@pytest.mark.parametrize(
    ("value", "bucket"), [(-1.0, 0), (0.0, 0), (0.1, 0), (0.100001, 1), (1.0, 1), (1.5, 2), (float("inf"), 2)]
)
def test_a_value_falls_into_the_bucket_whose_bound_it_does_not_exceed(value: float, bucket: int) -> None:
    """Bounds are inclusive; clocks of other machines do not make a sum fall."""
    distribution = Distribution((0.1, 1.0))

    distribution.observe(value)

    assert distribution.buckets.index(1) == bucket
    assert distribution.count == 1
    assert distribution.sum == max(value, 0.0)


def test_a_histogram_is_cumulative_and_ends_in_its_count(service: Service) -> None:
    """Prometheus computes quantiles from cumulative buckets."""
    for seconds in (0.001, 0.003, 0.3, 100_000.0):
        service.counts.response_latency.observe(seconds)

    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in service.samples().items()
        if name == "tierstream_response_latency_seconds_bucket"
    }

    assert [buckets[bound] for bound in (0.005, 0.25, 0.5, 7200.0, float("inf"))] == [2, 2, 3, 3, 4]
    assert list(buckets) == sorted(buckets)
    assert service.value("tierstream_response_latency_seconds_count") == 4


def test_bounds_are_ascending_and_hold_the_deadlines_they_are_about() -> None:
    """Timeouts stand apart from slow successes only if the deadline is a bound (20 s an attempt, 25 s a drain)."""
    for bounds in (metrics.OPERATION_BOUNDS, metrics.LATENCY_BOUNDS, metrics.GROUP_BOUNDS):
        assert list(bounds) == sorted(set(bounds))
    assert 20.0 in metrics.OPERATION_BOUNDS
    assert 25.0 in metrics.GROUP_BOUNDS


def test_totals_tell_failures_from_missing_objects(service: Service) -> None:
    """Contract 2.2, 8: 404 to get or head is a success; 404 to an insert is `reference_unreadable`."""
    be_busy(service)
    service.counts.responses["insert", 404] += 1
    service.counts.responses["delete", 503] += 2

    assert service.counts.totals() == {
        "records": 6,
        "responses": 8,
        "failures": 4,
        "poison": 1,
        "dead_letters": 1,
        "commits": 1,
        "rebalances": 1,
    }


class StalledLoop:
    """An event loop whose time is set by hand, and whose timers are called by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []
        self.cancelled = 0

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, call: Callable[..., None], *arguments: object) -> SimpleNamespace:
        self.timers.append((due, call, arguments))
        return SimpleNamespace(cancel=self.cancel)

    def cancel(self) -> None:
        self.cancelled += 1
        self.timers.clear()

    def turn(self, late: float) -> None:
        """Call the timer *late* seconds after it was due."""
        ((due, call, arguments),) = self.timers
        self.timers.clear()
        self.now = due + late
        call(*arguments)


def test_the_loop_lag_is_the_worst_of_the_last_quarter_minute() -> None:
    """H9: a stall between two scrapes is seen by the second one, and is gone from the one after."""
    loop, lag = StalledLoop(), EventLoopLag()
    unknown = lag.seconds
    lag.start(cast("asyncio.AbstractEventLoop", loop))

    loop.turn(late=0.5)
    loop.turn(late=0.001)
    stalled = lag.seconds
    for _ in range(metrics.LAG_SAMPLES - 1):
        loop.turn(late=0.001)

    assert unknown is None
    assert stalled == 0.5
    assert lag.seconds == pytest.approx(0.001)


async def test_the_loop_lag_sampler_leaves_nothing_behind() -> None:
    """Its owner stops it; no timer and no stale number stays."""
    loop, lag = StalledLoop(), EventLoopLag()
    lag.stop()
    lag.start(cast("asyncio.AbstractEventLoop", loop))
    loop.turn(late=0.5)

    lag.stop()
    lag.stop()

    assert loop.cancelled == 1
    assert lag.seconds is None
    real = EventLoopLag()
    real.start()
    real.stop()
