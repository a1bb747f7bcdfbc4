"""Metrics: counted in plain integers where things happen, turned into Prometheus families when somebody asks.

1. The pipeline writes to one :class:`Counts`: attributes, dictionaries and :class:`Distribution` objects of plain
   Python, bound once by whoever counts often. Counting a record costs an addition; nothing is looked up by label.
2. State that is true only *now* (permits, windows, positions) is not counted at all: it is read from the limiter and
   from the ``/debug/state`` snapshot at scrape time. So the series of a revoked partition have nothing to be deleted
   from: the snapshot no longer has the partition, and the scrape no longer has the series.
3. :class:`TierstreamCollector` puts both into the families of the :data:`CATALOGUE`, on a registry that is passed in.

A histogram may name a record for each bucket, its *exemplar*: OpenMetrics has them, plain text has not. Whoever
observes what a record's operation has taken need not know the record: it is asked for, at most once in
:data:`EXAMPLE_SECONDS` for each bucket, by way of :data:`record_at_work`.

Unknown numbers (None) give no sample, as zero would be a lie. Labels are bounded: topics and partitions that are
assigned, codes, reasons and kinds of this program; never an object key. All of this belongs to the event loop's
thread: counting elsewhere, or scraping from another thread, is the caller's mistake.

Names, types and labels are public contract; help texts say what to do about a number, and may change.
"""

from __future__ import annotations

import asyncio
import platform
import re
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from itertools import accumulate
from typing import Any, Final, Literal, NamedTuple, NotRequired, Protocol, TypeAlias, TypedDict, get_args

from prometheus_client import CollectorRegistry, Metric, samples
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

KINDS: Final = ("insert", "get", "delete", "head")
"""Kinds of operations; a response to a record that could not be decoded has the kind ``unknown``."""

UNKNOWN_KIND: Final = "unknown"

PAUSE_REASONS: Final = (
    "at_capacity",
    "bytes",
    "offset_distance",
    "poison_limit",
    "storage_unavailable",
    "registry",
    "output",
    "out_of_range",
    "recovering",
)
"""Every reason for which a partition can be paused; each is a series of its own, 0 or 1, on every partition."""

# --------------------------------------------------------------------------------------------- the catalogue


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric: its public name, type and labels, and what to do about it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    text: str


_PARTITION: Final = ("topic", "partition")

# fmt: off
_DEFINITIONS: Final = (
    # ---- permits
    Definition("tierstream_concurrency_limit", "gauge", (),
        "Permits of this process (concurrency.limit). Raise it only where storage is not the bottleneck."),
    Definition("tierstream_concurrency_in_use", "gauge", (),
        "Permits reserved by windows, used or not. At the limit with low window_in_flight: fewer, larger windows."),
    Definition("tierstream_concurrency_available", "gauge", (),
        "Permits nobody holds. 0 means that the next assigned partition gets its share only by the share rule."),
    Definition("tierstream_concurrency_queued", "gauge", (),
        "Single operations waiting for a permit. Above 0 for long: raise concurrency.limit or add a process."),
    Definition("tierstream_concurrency_rejected_total", "counter", (),
        "Reservations and single operations refused for want of permits. Rising: more permits or fewer partitions."),
    Definition("tierstream_permits_acquired_total", "counter", (),
        "Permits handed out. With the released ones it shows spikes that a scraped gauge misses."),
    Definition("tierstream_permits_released_total", "counter", (),
        "Permits given back. Acquired minus released equals in_use; anything else is a leak: report it."),
    # ---- windows
    Definition("tierstream_window_permits", "gauge", _PARTITION,
        "Size of the partition's window, fixed for its assignment. 0: the partition waits for permits."),
    Definition("tierstream_window_in_flight", "gauge", _PARTITION,
        "Operations running now. At the window with lag rising: storage is slow or the window is too small."),
    Definition("tierstream_window_utilization_ratio", "gauge", _PARTITION,
        "In flight divided by permits. Near 1 with lag: raise window.fraction; near 0 without lag: nothing to do."),
    Definition("tierstream_window_reservations_total", "counter", ("outcome",),
        "Attempts to reserve a window. at_capacity rising: concurrency.limit is too low for the partitions assigned."),
    Definition("tierstream_window_reservation_wait_seconds", "histogram", (),
        "From assignment of a partition to its reservation. Seconds here are seconds without a record read."),
    # ---- operations and records
    Definition("tierstream_operations_started_total", "counter", ("kind",),
        "Operations begun. Started without ending: compare with the count of operation_duration_seconds."),
    Definition("tierstream_operation_duration_seconds", "histogram", ("kind", "outcome"),
        "From start to outcome of an operation, retries included. Slow: look at storage_request_duration_seconds."),
    Definition("tierstream_records_total", "counter", (*_PARTITION, "result"),
        "Input records read, by what they became. Poison rising: a producer writes what this service cannot read."),
    Definition("tierstream_poison_records_total", "counter", ("code",),
        "Records that never became an operation. Find them in the dead letter topic, by header tierstream-dlq-code."),
    Definition("tierstream_dead_letters_total", "counter", ("code",),
        "Dead letters acknowledged. After the cause is gone, put them back with `tierstream replay`."),
    Definition("tierstream_responses_total", "counter", ("kind", "status"),
        "Responses acknowledged by the output broker. 4xx is the producer's side, 5xx is ours or the storage's."),
    Definition("tierstream_response_latency_seconds", "histogram", (),
        "From the timestamp of the record to the acknowledgement of its response; includes the time it lay in Kafka."),
    # ---- partitions
    Definition("tierstream_partition_position", "gauge", _PARTITION,
        "Next offset to read. Standing still with lag: see partition_paused, then `tierstream why`."),
    Definition("tierstream_partition_committed_offset", "gauge", _PARTITION,
        "Last committed offset, exclusive. Far below lowest_unfinished_offset: commits fail, see commits_total."),
    Definition("tierstream_partition_lowest_unfinished_offset", "gauge", _PARTITION,
        "The record everything waits for. Standing still while position moves: that one operation hangs."),
    Definition("tierstream_partition_high_watermark", "gauge", _PARTITION,
        "End of the partition as the broker last told. Moving while position stands: read partition_paused."),
    Definition("tierstream_partition_lag", "gauge", _PARTITION,
        "Records not yet finished. Growing for long: add processes, up to one for each partition."),
    Definition("tierstream_partition_oldest_in_flight_seconds", "gauge", _PARTITION,
        "Age of the oldest operation not yet answered; no series where none is. Minutes: storage does not answer."),
    Definition("tierstream_partition_finished_above_gap", "gauge", _PARTITION,
        "Finished offsets above the lowest unfinished one. Large: one slow operation holds the commit back."),
    Definition("tierstream_partition_offset_map_bytes", "gauge", _PARTITION,
        "Size of the offset map in the last commit. Near the broker's limit: look at finished_above_gap."),
    Definition("tierstream_partition_last_commit_timestamp_seconds", "gauge", _PARTITION,
        "When this assignment last committed. Old while records finish: the coordinator does not answer."),
    Definition("tierstream_partition_paused", "gauge", (*_PARTITION, "reason"),
        "1 while the partition is paused for this reason. The reason names the part to look at."),
    Definition("tierstream_assigned_partitions", "gauge", (),
        "Partitions this process owns. 0 with others owning more than one each: this process is not in the group."),
    # ---- group and commits
    Definition("tierstream_rebalances_total", "counter", ("outcome",),
        "Partitions given up in rebalances. timeout: drain cut off, expect duplicates; lost: we were expelled."),
    Definition("tierstream_rebalance_drain_seconds", "histogram", (),
        "Time to finish what was in flight when partitions were revoked. Near rebalance.drain_timeout: raise it."),
    Definition("tierstream_commit_duration_seconds", "histogram", (),
        "Round trip of an offset commit. Slow commits mean more repeats after a crash, nothing is lost."),
    Definition("tierstream_commits_total", "counter", ("outcome",),
        "Offset commits. lost: the assignment was gone; unknown: no answer, the next commit settles it."),
    Definition("tierstream_offset_maps_dropped_total", "counter", ("reason",),
        "Offset maps not stored or not believed. A restart then repeats records finished above the gap."),
    # ---- storage
    Definition("tierstream_storage_request_duration_seconds", "histogram", ("tier", "operation", "outcome"),
        "One request to a storage backend, each attempt by itself. Errors here are retried before they are answered."),
    Definition("tierstream_storage_retries_total", "counter", ("tier", "operation"),
        "Attempts after the first. Rising: the backend is overloaded or away; partitions may pause."),
    Definition("tierstream_storage_conflicts_total", "counter", ("tier", "operation"),
        "Swaps that another writer won. Normal where writers share objects; high rates: key records by object."),
    Definition("tierstream_storage_bytes_total", "counter", ("tier", "direction"),
        "Payload bytes read from and written to a tier. For capacity and cost."),
    Definition("tierstream_change_log_entries", "gauge", (),
        "Changes across both tiers not yet cleaned up. Growing without end: deletes in the long-term tier fail."),
    Definition("tierstream_orphans_removed_total", "counter", (),
        "Long-term revisions removed because nothing points to them. After a crash a few are expected."),
    # ---- process
    Definition("tierstream_in_flight_bytes", "gauge", (),
        "Bytes charged to limits.in_flight_bytes. At the limit partitions pause for `bytes`."),
    Definition("tierstream_event_loop_lag_seconds", "gauge", (),
        "Worst delay of the event loop in the last 15 s. Above 1 s: something blocks, or CPU is short."),
    Definition("tierstream_build_info", "gauge", ("version", "python"),
        "Always 1; the labels say which release runs on which Python."),
)
# fmt: on

CATALOGUE: Final = {definition.name: definition for definition in _DEFINITIONS}
"""Every metric of this program by name."""

# --------------------------------------------------------------------------------------------- counting

OPERATION_BOUNDS: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    20.0,
    60.0,
)
"""Seconds of one operation or one storage request: from a write to a local file to three attempts of
``retry.attempt_timeout`` (20 s, a bound of its own so that timeouts stand apart)."""

LATENCY_BOUNDS: Final = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    1800.0,
    7200.0,
)
"""Seconds from a record's timestamp to its answer: long after an outage, when a backlog is worked off."""

GROUP_BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Seconds of commits, drains and waits for a reservation: ``rebalance.drain_timeout`` (25 s) is a bound."""


EXEMPLAR_CHARACTERS_MAX: Final = 128
"""Of all names and values of an exemplar's labels together. Source: OpenMetrics 1.0; a scraper may refuse all of it."""


class Exemplar(NamedTuple):
    """One observed value, and what it was observed of."""

    labels: Mapping[str, str]
    value: float
    timestamp: float
    """Seconds since the epoch."""


EXAMPLE_SECONDS: Final = 1.0
"""How long a bucket keeps its exemplar while values come: as often as anybody looks, far less often than they come."""

record_at_work: ContextVar[Callable[[int | None], Mapping[str, str] | None] | None] = ContextVar(
    "record_at_work", default=None
)
"""Returns the labels of the record at an index, with None of the one that the current task works on; None where there
is none. Set by whoever has the records, for its task and all that come from it."""


def record_labels(
    topic: str,
    partition: int,
    offset: int,
    headers: Iterable[tuple[str, bytes | None]],
    trace_id: str | None = None,
) -> dict[str, str]:
    """Name a record in an exemplar, and its trace: *trace_id*, else what its producer says (``traceparent``).

    Where that is too long it is the topic that is cut: ``tierstream inspect`` needs the other two.
    """
    labels = {"offset": str(offset), "partition": str(partition)}
    if trace_id is not None:
        labels["trace_id"] = trace_id
    for name, value in () if trace_id is not None else headers:
        if name == "traceparent" and value is not None and (found := _TRACE_PARENT.fullmatch(value)) is not None:
            labels["trace_id"] = found[1].decode()
    room = EXEMPLAR_CHARACTERS_MAX - len("topic") - sum(len(name) + len(value) for name, value in labels.items())
    return {"topic": topic[:room], **labels}


_TRACE_PARENT: Final = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
"""Source: W3C Trace Context, version 00."""


class Distribution:
    """Observed values in buckets, as cheap as plain Python allows; read at scrape time only.

    Args:
        bounds: Upper bounds of the buckets, inclusive, ascending; one more bucket is above them all.
    """

    __slots__ = ("_due", "bounds", "buckets", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...] = OPERATION_BOUNDS) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        """Values by bucket, *not* cumulative."""
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}
        """By bucket, the newest."""
        self._due = [0.0] * (len(bounds) + 1)
        """By bucket, from when on another exemplar is asked for; monotonic seconds."""

    def observe(self, value: float) -> None:
        """Count *value*. Clocks of other machines may make it negative: that counts as 0."""
        if value < 0.0:  # noqa: PLR1730 - calling max() costs as much as all the rest
            value = 0.0
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_of_record(self, value: float, now: float, index: int | None = None) -> None:
        """Count *value*, at *now* (monotonic seconds) of work on a record; now and then name that record.

        It is the one at *index*, or the one that the current task works on, as :data:`record_at_work` tells.
        """
        bucket = bisect_left(self.bounds, value)
        self.buckets[bucket] += 1
        self.sum += value
        if now >= self._due[bucket]:
            self._due[bucket] = now + EXAMPLE_SECONDS
            labels_of = record_at_work.get()
            labels = None if labels_of is None else labels_of(index)
            if labels is not None:
                self.exemplars[bucket] = Exemplar(labels, value, time.time())

    def exemplify(self, exemplar: Exemplar) -> None:
        """Show *exemplar*, which has been observed, for its bucket; one for many values, as it costs more than they."""
        self.exemplars[bisect_left(self.bounds, exemplar.value)] = exemplar

    @property
    def count(self) -> int:
        """Values observed."""
        return sum(self.buckets)


class OperationCounts:
    """What happened to operations of one kind: ``started += 1``, later one of the two ``observe(seconds)``."""

    __slots__ = ("error", "started", "success")

    def __init__(self) -> None:
        self.started = 0
        self.success = Distribution()
        self.error = Distribution()

    @property
    def ended(self) -> int:
        """How many are not in flight any more."""
        return sum(self.success.buckets) + sum(self.error.buckets)


class PartitionCounts:
    """Records of one input partition, bound once by its assignment: ``operations += n``, ``poison += n``."""

    __slots__ = ("operations", "poison")

    def __init__(self) -> None:
        self.operations = 0
        self.poison = 0


class RequestCounts:
    """Requests of one storage operation on one tier, bound once by whoever sends them."""

    __slots__ = ("conflicts", "error", "retries", "success")

    def __init__(self) -> None:
        self.success = Distribution()
        self.error = Distribution()
        self.retries = 0
        self.conflicts = 0


Tier: TypeAlias = Literal["high_volume", "long_term", "change_log"]
Direction: TypeAlias = Literal["read", "write"]
CommitOutcome: TypeAlias = Literal["success", "lost", "unknown"]
RebalanceOutcome: TypeAlias = Literal["drained", "timeout", "lost"]
ReservationOutcome: TypeAlias = Literal["granted", "at_capacity"]


class Counts:
    """All that the process counts; one object, handed to every part that counts, written on the event loop's thread.

    Attributes are written directly: ``counts.responses[kind, status] += 1``. What is written for each record should be
    bound to a local name first (``latency = counts.response_latency.observe``), or summed up for a batch.
    """

    __slots__ = (
        "_partitions",
        "_requests",
        "commit_seconds",
        "commits",
        "dead_letters",
        "drain_seconds",
        "offset_maps_dropped",
        "operations",
        "orphans_removed",
        "poison",
        "rebalances",
        "reservation_wait_seconds",
        "reservations",
        "response_latency",
        "responses",
        "storage_bytes",
    )

    def __init__(self) -> None:
        self.operations: Mapping[str, OperationCounts] = {kind: OperationCounts() for kind in KINDS}
        """By kind, all of :data:`KINDS` from the start."""
        self.responses: defaultdict[tuple[str, int], int] = defaultdict(int)
        """Acknowledged responses by (kind or ``unknown``, status)."""
        self.response_latency = Distribution(LATENCY_BOUNDS)
        """Seconds from record timestamp to acknowledgement."""
        self.poison: defaultdict[str, int] = defaultdict(int)
        """Poison records by code; they are counted in their :class:`PartitionCounts` too."""
        self.dead_letters: defaultdict[str, int] = defaultdict(int)
        """Acknowledged dead letters by code."""
        self.commits: dict[CommitOutcome, int] = {"success": 0, "lost": 0, "unknown": 0}
        self.commit_seconds = Distribution(GROUP_BOUNDS)
        self.rebalances: dict[RebalanceOutcome, int] = {"drained": 0, "timeout": 0, "lost": 0}
        self.drain_seconds = Distribution(GROUP_BOUNDS)
        self.reservations: dict[ReservationOutcome, int] = {"granted": 0, "at_capacity": 0}
        self.reservation_wait_seconds = Distribution(GROUP_BOUNDS)
        self.storage_bytes: defaultdict[tuple[Tier, Direction], int] = defaultdict(int)
        """Payload bytes by (tier, direction)."""
        self.orphans_removed = 0
        self.offset_maps_dropped: defaultdict[str, int] = defaultdict(int)
        """Offset maps by the reason they were not stored or not believed for."""
        self._partitions: dict[tuple[str, int], PartitionCounts] = {}
        self._requests: dict[tuple[Tier, str], RequestCounts] = {}

    def partition(self, topic: str, partition: int) -> PartitionCounts:
        """Return the counts of an input partition; the same object for every assignment of it, so they never fall."""
        return self._partitions.setdefault((topic, partition), PartitionCounts())

    def requests(self, tier: Tier, operation: str) -> RequestCounts:
        """Return the counts of one storage operation on one tier; *operation* is a method's name, never a key."""
        return self._requests.setdefault((tier, operation), RequestCounts())

    def committed(self, outcome: CommitOutcome, seconds: float) -> None:
        """Count one commit and its round trip."""
        self.commits[outcome] += 1
        self.commit_seconds.observe(seconds)

    def drained(self, outcome: RebalanceOutcome, seconds: float) -> None:
        """Count one partition given up, and how long its drain took."""
        self.rebalances[outcome] += 1
        self.drain_seconds.observe(seconds)

    def reserved(self, wait_seconds: float) -> None:
        """Count a granted reservation and the time since the partition was assigned."""
        self.reservations["granted"] += 1
        self.reservation_wait_seconds.observe(wait_seconds)

    def totals(self) -> Totals:
        """Sum up for ``/debug/state``, over the life of the process and whatever partitions it had."""
        return {
            "records": sum(counts.operations + counts.poison for counts in self._partitions.values()),
            "responses": sum(self.responses.values()),
            "failures": sum(number for (kind, status), number in self.responses.items() if is_failure(kind, status)),
            "poison": sum(self.poison.values()),
            "dead_letters": sum(self.dead_letters.values()),
            "commits": self.commits["success"],
            "rebalances": sum(self.rebalances.values()),
        }


    def traffic(self) -> dict[Tier, TierTraffic]:
        """Sum up by tier for ``/debug/state``."""
        traffic: dict[Tier, TierTraffic] = {
            tier: {
                "requests": 0,
                "errors": 0,
                "bytes_read": self.storage_bytes.get((tier, "read"), 0),
                "bytes_written": self.storage_bytes.get((tier, "write"), 0),
            }
            for tier in get_args(Tier)
        }
        for (tier, _operation), requests in self._requests.items():
            errors = requests.error.count
            traffic[tier]["requests"] += requests.success.count + errors
            traffic[tier]["errors"] += errors
        return traffic


def is_failure(kind: str, status: int) -> bool:
    """Tell whether a response carries a ``Failure``: a missing object (404 to get or head) is a success."""
    return status >= 400 and not (status == 404 and kind in {"get", "head"})


# --------------------------------------------------------------------------------------------- what is true now


class LimiterState(TypedDict):
    """``limiter`` of ``/debug/state``."""

    limit: int
    in_use: int
    available: int
    queued: int


class OldestState(TypedDict):
    """The oldest operation of a partition that has no answer yet."""

    offset: int
    kind: str | None
    key_digest: str | None
    attempts: int
    age_seconds: float
    last_error: str | None
    """A failure's code; what it says, which is safe to show, is the message."""
    last_error_message: str | None


class PartitionState(TypedDict):
    """One entry of ``partitions`` of ``/debug/state``; unknown numbers are None."""

    topic: str
    partition: int
    epoch: int
    window: int | None
    in_flight: int
    buffered: int
    position: int | None
    committed: int | None
    lowest_unfinished: int | None
    finished_above_gap: int | None
    high_watermark: int | None
    lag: int | None
    paused_for: list[str]
    oldest: OldestState | None
    last_commit_timestamp: NotRequired[float | None]
    """Seconds since the epoch of this assignment's last successful commit."""
    offset_map_bytes: NotRequired[int | None]
    records: NotRequired[int | None]
    """Records of it that this process has read since its start, in all assignments."""


class Totals(TypedDict):
    """``totals`` of ``/debug/state``: since the start of the process."""

    records: int
    responses: int
    failures: int
    poison: int
    dead_letters: int
    commits: int
    rebalances: int


class TierTraffic(TypedDict):
    """What has gone to and from a tier since the start of the process."""

    requests: int
    errors: int
    bytes_read: int
    bytes_written: int


class DebugState(TypedDict):
    """The snapshot behind ``/debug/state``, the status page and the gauges of a scrape (contract 8)."""

    state: Literal["starting", "running", "rebalancing", "draining", "stopped"]
    limiter: LimiterState
    partitions: list[PartitionState]
    totals: Totals
    storage: dict[str, Any]
    """Free in form; ``change_log_entries`` (int or None) is read by the scrape, ``traffic`` is :class:`TierTraffic` by
    tier."""
    in_flight_bytes: NotRequired[int | None]
    """Bytes charged to the byte budget."""
    last_errors: NotRequired[list[dict[str, Any]]]
    """Lines of the log at warning or above, the newest last (:class:`consumer.log.LastErrors`)."""


Snapshot: TypeAlias = Callable[[], Mapping[str, Any]]
"""Returns a :class:`DebugState`; called on the event loop, for every scrape and every look at the status page."""


class PermitCounts(Protocol):
    """What a scrape reads from the limiter."""

    @property
    def limit(self) -> int:
        """Permits in all."""

    @property
    def in_use(self) -> int:
        """Permits held."""

    @property
    def available(self) -> int:
        """Permits free."""

    @property
    def queued(self) -> int:
        """Callers waiting."""

    @property
    def rejected(self) -> int:
        """Callers refused so far."""

    @property
    def acquired_total(self) -> int:
        """Permits handed out so far."""

    @property
    def released_total(self) -> int:
        """Permits given back so far."""


class EventLoopLag:
    """Samples how late the event loop is; its owner starts and stops it.

    A timer asks to be called every :data:`LAG_INTERVAL_SECONDS` and notes how much later it was called. No task of its
    own, so nothing to cancel and nothing that can end unseen.
    """

    def __init__(self) -> None:
        self._lags: deque[float] = deque(maxlen=LAG_SAMPLES)
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._due = 0.0

    @property
    def seconds(self) -> float | None:
        """The worst of the last 15 s; None before the first sample and after :meth:`stop`."""
        return max(self._lags, default=None)

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Begin sampling *loop*, the running one by default."""
        self._loop = loop or asyncio.get_running_loop()
        self._expect(self._loop)

    def stop(self) -> None:
        """End sampling; may be called twice, and without :meth:`start`."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop = None
        self._lags.clear()

    def _expect(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + LAG_INTERVAL_SECONDS
        self._timer = loop.call_at(self._due, self._sample, loop)

    def _sample(self, loop: asyncio.AbstractEventLoop) -> None:
        self._lags.append(max(0.0, loop.time() - self._due))
        self._expect(loop)


LAG_INTERVAL_SECONDS: Final = 0.25
"""Stalls shorter than this may be missed; heartbeats (3 s) are in danger only from far longer ones."""
LAG_SAMPLES: Final = 60
"""15 s of samples, a usual scrape interval: every stall is seen by at least one scrape of each scraper."""

# --------------------------------------------------------------------------------------------- scraping

Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def new_registry() -> CollectorRegistry:
    """Return an empty registry; the process-wide one of the library is never used."""
    return CollectorRegistry()


def register(
    registry: CollectorRegistry,
    counts: Counts,
    limiter: PermitCounts,
    snapshot: Snapshot,
    *,
    loop_lag: EventLoopLag | None = None,
    version: str | None = None,
) -> None:
    """Put all metrics of the process on *registry*: ours, and ``process_*`` (memory, CPU, open files).

    Raises:
        ValueError: they are on it already.
    """
    registry.register(TierstreamCollector(counts, limiter, snapshot, loop_lag=loop_lag, version=version))
    ProcessCollector(registry=registry)


class TierstreamCollector(Collector):
    """Turns counts and state into families, at each scrape, on the event loop's thread.

    Args:
        counts: What was counted.
        limiter: The permits of the process.
        snapshot: The state behind ``/debug/state``.
        loop_lag: A started sampler; without one the gauge has no sample.
        version: Release for ``build_info``; the installed distribution's by default.
    """

    def __init__(
        self,
        counts: Counts,
        limiter: PermitCounts,
        snapshot: Snapshot,
        *,
        loop_lag: EventLoopLag | None = None,
        version: str | None = None,
    ) -> None:
        self._counts = counts
        self._limiter = limiter
        self._snapshot = snapshot
        self._loop_lag = loop_lag
        self._build = (version or _installed_version(), platform.python_version())

    def describe(self) -> Iterator[Family]:
        """Name the families without taking a snapshot; the registry refuses a second collector by these names."""
        return map(_family, _DEFINITIONS)

    def collect(self) -> Iterator[Family]:
        """Return every family of the catalogue, in its order, with the samples that are known now."""
        scrape = _Scrape()
        state = self._snapshot()
        self._collect_process(scrape, state)
        self._collect_pipeline(scrape)
        self._collect_storage(scrape)
        partitions = state["partitions"]
        scrape.value("tierstream_assigned_partitions", len(partitions))
        for partition in partitions:
            self._collect_partition(scrape, partition)
        return iter(scrape.families.values())

    def _collect_process(self, scrape: _Scrape, state: Mapping[str, Any]) -> None:
        limiter = self._limiter
        scrape.value("tierstream_concurrency_limit", limiter.limit)
        scrape.value("tierstream_concurrency_in_use", limiter.in_use)
        scrape.value("tierstream_concurrency_available", limiter.available)
        scrape.value("tierstream_concurrency_queued", limiter.queued)
        scrape.value("tierstream_concurrency_rejected_total", limiter.rejected)
        scrape.value("tierstream_permits_acquired_total", limiter.acquired_total)
        scrape.value("tierstream_permits_released_total", limiter.released_total)
        scrape.value("tierstream_in_flight_bytes", state.get("in_flight_bytes"))
        scrape.value("tierstream_change_log_entries", (state.get("storage") or {}).get("change_log_entries"))
        scrape.value("tierstream_event_loop_lag_seconds", self._loop_lag.seconds if self._loop_lag else None)
        scrape.value("tierstream_build_info", 1, *self._build)

    def _collect_pipeline(self, scrape: _Scrape) -> None:
        counts = self._counts
        for kind, operation in counts.operations.items():
            scrape.value("tierstream_operations_started_total", operation.started, kind)
            scrape.distribution("tierstream_operation_duration_seconds", operation.success, kind, "success")
            scrape.distribution("tierstream_operation_duration_seconds", operation.error, kind, "error")
        for (kind, status), number in counts.responses.items():
            scrape.value("tierstream_responses_total", number, kind, str(status))
        scrape.distribution("tierstream_response_latency_seconds", counts.response_latency)
        scrape.values("tierstream_poison_records_total", counts.poison)
        scrape.values("tierstream_dead_letters_total", counts.dead_letters)
        scrape.values("tierstream_window_reservations_total", counts.reservations)
        scrape.distribution("tierstream_window_reservation_wait_seconds", counts.reservation_wait_seconds)
        scrape.values("tierstream_rebalances_total", counts.rebalances)
        scrape.distribution("tierstream_rebalance_drain_seconds", counts.drain_seconds)
        scrape.values("tierstream_commits_total", counts.commits)
        scrape.distribution("tierstream_commit_duration_seconds", counts.commit_seconds)
        scrape.values("tierstream_offset_maps_dropped_total", counts.offset_maps_dropped)

    def _collect_storage(self, scrape: _Scrape) -> None:
        counts = self._counts
        for (tier, operation), requests in counts._requests.items():  # noqa: SLF001 - the other half of the same thing
            name = "tierstream_storage_request_duration_seconds"
            scrape.distribution(name, requests.success, tier, operation, "success")
            scrape.distribution(name, requests.error, tier, operation, "error")
            scrape.value("tierstream_storage_retries_total", requests.retries, tier, operation)
            scrape.value("tierstream_storage_conflicts_total", requests.conflicts, tier, operation)
        for (tier, direction), number in counts.storage_bytes.items():
            scrape.value("tierstream_storage_bytes_total", number, tier, direction)
        scrape.value("tierstream_orphans_removed_total", counts.orphans_removed)

    def _collect_partition(self, scrape: _Scrape, state: Mapping[str, Any]) -> None:
        topic, partition = labels = (state["topic"], str(state["partition"]))
        window, in_flight = state["window"], state["in_flight"]
        oldest_seconds = state["oldest"]["age_seconds"] if state["oldest"] else None
        records = self._counts.partition(topic, state["partition"])
        scrape.value("tierstream_window_permits", window, *labels)
        scrape.value("tierstream_window_in_flight", in_flight, *labels)
        scrape.value("tierstream_window_utilization_ratio", in_flight / window if window else None, *labels)
        scrape.value("tierstream_records_total", records.operations, *labels, "operation")
        scrape.value("tierstream_records_total", records.poison, *labels, "poison")
        scrape.value("tierstream_partition_position", state["position"], *labels)
        scrape.value("tierstream_partition_committed_offset", state["committed"], *labels)
        scrape.value("tierstream_partition_lowest_unfinished_offset", state["lowest_unfinished"], *labels)
        scrape.value("tierstream_partition_high_watermark", state["high_watermark"], *labels)
        scrape.value("tierstream_partition_lag", state["lag"], *labels)
        scrape.value("tierstream_partition_oldest_in_flight_seconds", oldest_seconds, *labels)
        scrape.value("tierstream_partition_finished_above_gap", state["finished_above_gap"], *labels)
        scrape.value("tierstream_partition_offset_map_bytes", state.get("offset_map_bytes"), *labels)
        last_commit = state.get("last_commit_timestamp")
        scrape.value("tierstream_partition_last_commit_timestamp_seconds", last_commit, *labels)
        paused_for = state["paused_for"]
        for reason in PAUSE_REASONS:
            scrape.value("tierstream_partition_paused", int(reason in paused_for), topic, partition, reason)


PlainExemplar: TypeAlias = tuple[Mapping[str, str], float, float]
"""Labels, value and timestamp of an exemplar."""

PlainSample: TypeAlias = tuple[str, Mapping[str, str], float, PlainExemplar | None]
"""Name, labels, value and exemplar of a sample: ``("tierstream_commits_total", {"outcome": "success"}, 12, None)``."""


@dataclass(frozen=True, slots=True)
class PlainFamily:
    """A family in plain values, to be sent to another process."""

    name: str
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    text: str
    samples: list[PlainSample]


Collected: TypeAlias = list[Metric]
"""Families as the encoders take them."""


def plain(families: Iterable[Metric]) -> list[PlainFamily]:
    """Take collected families apart; :func:`families_of` puts them together again."""
    return [
        PlainFamily(
            family.name,
            family.type,
            family.documentation,
            [(sample.name, sample.labels, sample.value, _plain_exemplar(sample.exemplar)) for sample in family.samples],
        )
        for family in families
    ]


def families_of(plain_families: Iterable[PlainFamily]) -> Collected:
    """Make families for the encoders of plain ones."""
    made = []
    for family in plain_families:
        metric = Metric(family.name, family.text, family.kind)
        for name, labels, value, exemplar in family.samples:
            shown = _shown(Exemplar(*exemplar)) if exemplar is not None else None
            metric.add_sample(name, dict(labels), value, exemplar=shown)
        made.append(metric)
    return made


def _plain_exemplar(exemplar: samples.Exemplar | None) -> PlainExemplar | None:
    if exemplar is None:
        return None
    assert exemplar.timestamp is not None, "ours have one"
    return exemplar.labels, exemplar.value, float(exemplar.timestamp)


def register_process(registry: CollectorRegistry) -> None:
    """Put only ``process_*`` (memory, CPU, open files) on *registry*: of a process that has nothing else to show."""
    ProcessCollector(registry=registry)


class _Scrape:
    """The families of one scrape while they are filled; a name that is not in the catalogue is a KeyError."""

    def __init__(self) -> None:
        self.families = {definition.name: _family(definition) for definition in _DEFINITIONS}

    def value(self, name: str, value: float | None, *labels: str) -> None:
        """Add the sample of a gauge or counter; an unknown value adds none."""
        if value is not None:
            family = self.families[name]
            assert not isinstance(family, HistogramMetricFamily)
            family.add_metric(labels, value)

    def values(self, name: str, by_label: Mapping[Any, int]) -> None:
        """Add the samples of a counter with one label."""
        for label, number in by_label.items():
            self.value(name, number, label)

    def distribution(self, name: str, distribution: Distribution, *labels: str) -> None:
        """Add the samples of a histogram, cumulative as Prometheus wants them."""
        family = self.families[name]
        assert isinstance(family, HistogramMetricFamily)
        names = _bucket_names(distribution.bounds)
        buckets: list[Any] = list(zip(names, accumulate(distribution.buckets), strict=True))
        for bucket, exemplar in distribution.exemplars.items():
            buckets[bucket] = (*buckets[bucket], _shown(exemplar))
        family.add_metric(labels, buckets, distribution.sum)


def _shown(exemplar: Exemplar) -> samples.Exemplar:
    return samples.Exemplar(dict(exemplar.labels), exemplar.value, exemplar.timestamp)


@cache
def _bucket_names(bounds: tuple[float, ...]) -> list[str]:
    return [*map(floatToGoString, bounds), "+Inf"]


def _family(definition: Definition) -> Family:
    match definition.kind:
        case "counter":
            return CounterMetricFamily(definition.name, definition.text, labels=definition.labels)
        case "gauge":
            return GaugeMetricFamily(definition.name, definition.text, labels=definition.labels)
        case "histogram":
            return HistogramMetricFamily(definition.name, definition.text, labels=definition.labels)


def _installed_version() -> str:
    try:
        return installed_version("tierstream")
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "unknown"
