"""The composition root: builds every part, starts and stops them in order, and turns what happened into an exit code.

Start: storage (recovery of unfinished changes begins in the background), admin port, then the broker. An unreachable
broker is not an exit: the service stays up, not ready, and goes on trying. Missing topics, and an output topic that is
compacted without leave, are exit 2. With ``output.framing: confluent`` the schema registry has to take the responses'
schema: it is waited for like a broker, and its refusal is exit 2.

While it runs: a watchdog (:mod:`consumer.watchdog`) is shown every few seconds what moves. Where something stands still
for no reason, and the brokers would answer a fresh connection, the process ends with exit 3, as it does for any other
failure that a restart mends: not ready, every task's stack in the log, stopped in the order below without a drain. A
thread watches that the event loop comes round at all (:mod:`consumer.loop_watch`).

Stop, in this order, each step with a deadline:

1. *Poller*: poll no more, finish and answer what was started, commit, leave the group. Answers need the publisher, and
   operations need storage, so both outlive it; the schema registry is not needed any more.
2. *Publisher*: nothing is waiting in it any more after a full drain; after a drain that ran out of time, what waits is
   forgotten and will be answered by whoever owns the partition next.
3. *Storage*: join the clean-ups; those that do not end in time stand in the change log.
4. *Admin port*: last, so that the draining service can be watched.

A step that fails, or does not end within its deadline, is logged and left behind; the next one runs. What hangs then
(a thread on a disk that does not answer) would keep the interpreter from ending, so the process ends by force.

The first SIGTERM or SIGINT starts the stop, the second ends the process at once (130 or 143): a crash loses nothing.

One of several processes (``runtime.processes``) is the same, but for two things: its supervisor shows its state and
asks it to stop, so that it has no admin port of its own, and a signal beside that request is a first one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from consumer.admin import AdminServer
from consumer.assignment import Assignment, Lane, Pipeline
from consumer.avro_schemas import schema_text
from consumer.budget import ByteBudget
from consumer.codec import RESPONSE_PREFIX, OperationDecoder, got_bytes_max, registry_prefix
from consumer.commits import CommitPolicy
from consumer.config import RESPONSE_OVERHEAD_BYTES, Config
from consumer.errors import BackendError, BackendUnavailable, ConfigError
from consumer.exits import CLEAN, FAILURE, FATAL, POISONED, STOP_MARGIN_SECONDS, USAGE
from consumer.handler import Handler
from consumer.ids import ObjectId
from consumer.kafka.clients import TopicPartition, make_consumer, make_producer, make_transactional_producer
from consumer.kafka.poller import COMMIT_TIMEOUT_SECONDS, Poller
from consumer.kafka.publisher import Publisher
from consumer.kafka.topics import Cluster, TopicPlan, inspect_topics
from consumer.kafka.transactions import Transactions
from consumer.log import LastErrors, get_logger
from consumer.log import configure as configure_log
from consumer.loop_watch import LoopWatch
from consumer.metrics import Counts, DebugState, EventLoopLag, PartitionState, new_registry, register
from consumer.operations import Metadata, StoredObject
from consumer.permits import ConcurrencyLimiter
from consumer.poison import PoisonLimitReached, PoisonPolicy
from consumer.references import References
from consumer.registry import SchemaRegistry
from consumer.responses import response_partition
from consumer.retry import RetryPolicy
from consumer.service import StorageService
from consumer.stacks import task_stacks
from consumer.storage.factory import (
    BucketReader,
    make_bucket_reader,
    make_change_log,
    make_high_volume,
    make_long_term,
    open_parts,
)
from consumer.storage.tiered import TieredStorage
from consumer.suspects import Suspects
from consumer.telemetry import REPORTS_STOP_SECONDS, start_error_reports, start_tracing
from consumer.watchdog import LOOK_SECONDS, Suspicion, Watchdog, WatchdogTripped, watchdog_limits

if TYPE_CHECKING:
    from consumer.error_reports import ErrorReports
    from consumer.tracing import Tracing

CLIENT_STOP_SECONDS = 3.0
PUBLISHER_STOP_SECONDS = 2.0
STORAGE_JOIN_SECONDS = 3.0
STORAGE_CLOSE_SECONDS = 1.5
"""With the final commit's 5 s these four stay below :data:`~consumer.exits.STOP_MARGIN_SECONDS`: 14.5 s."""
TRACES_STOP_SECONDS = 3.0
"""For the last spans to be taken, while storage's clean-ups are joined; what is not taken by then is lost."""
STEP_SECONDS = 2.0
"""For a step that waits for nobody, and on top of what a step gives itself: longer, and it hangs."""

STACKS_A_LINE = 40
"""Tasks whose stacks share a line of the log: below what a line shows of a list."""

SAMPLE_SECONDS = 5.0
"""How often the entries of the change log are counted, for metrics and state."""

GC_THRESHOLD = 50_000
"""Allocations between collections of the youngest generation. What was built at start is frozen out of it; records,
operations and responses make no cycles, so that collecting them more often finds nothing (about 15 % of CPU)."""

_Result = TypeVar("_Result")

log = get_logger(__name__)


def main(config: Config) -> int:
    """Run the service until a signal or a failure ends it; return the exit code.

    Raises:
        ConfigError: ``runtime.loop`` asks for an event loop that is not installed.
    """
    with asyncio.Runner(loop_factory=loop_factory(config)) as runner:
        return runner.run(run(config))


def loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop of ``runtime.loop``; None for the standard library's.

    Raises:
        ConfigError: it is not installed.
    """
    if config.runtime.loop == "asyncio":
        return None
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        if config.runtime.loop == "uvloop":
            raise ConfigError("runtime.loop: uvloop is not installed; use auto or asyncio") from None
        return None
    return uvloop.new_event_loop


async def run(config: Config) -> int:
    """Run the service on the current event loop; return the exit code."""
    configure_log(config.log.level, config.log.format)
    app = App(config)
    return await app.run()


class _Limited:
    """The storage as the service sees it: a payload that no response could carry is not loaded.

    Where references are given, anything that might not fit is given by one. Else the encoder has the last word on what
    is close to the limit, since it alone knows exactly.
    """

    def __init__(self, storage: TieredStorage, response_bytes_max: int, *, by_reference: bool) -> None:
        def fits(metadata: Metadata) -> bool:
            return (got_bytes_max(metadata) if by_reference else metadata.size or 0) <= response_bytes_max

        self._storage = storage
        self._fits = fits
        self.put = storage.put
        self.head = storage.head
        self.delete = storage.delete
        self.join = storage.join

    async def get(self, object_id: ObjectId) -> StoredObject | None:
        """Read an object, its payload as it can be given in a response."""
        return await self._storage.get(object_id, fits=self._fits)


class App:
    """One service process.

    Args:
        config: The configuration.
        listens: Whether it has an admin port of its own; else somebody else shows :meth:`snapshot`, :meth:`readiness`
            and :attr:`registry`.
    """

    def __init__(self, config: Config, *, listens: bool = True) -> None:
        self._config = config
        self._listens = listens
        self._state: str = "starting"
        self._stop = asyncio.Event()
        self._asked_to_stop = False
        self._exit_code = CLEAN
        self._counts = Counts()
        self._limiter = ConcurrencyLimiter(config.concurrency.limit)
        self._lag = EventLoopLag()
        self._last_errors = LastErrors()
        self._budget = ByteBudget(config.limits.in_flight_bytes)
        self._storage_blocked = False
        self._change_log_entries: int | None = None
        self._not_started: str | None = "connecting to the broker"
        self._storage: TieredStorage | None = None
        self._buckets: BucketReader | None = None
        self._schemas: SchemaRegistry | None = None
        self._publisher: Publisher | None = None
        self._poller: Poller | None = None
        self._watching: asyncio.Task[None] | None = None
        self._tracing: Tracing | None = None
        self._reports: ErrorReports | None = None
        self._hanging: list[str] = []
        """Steps of the stop that did not end in time: the process must not wait for the same once more."""
        self.registry = new_registry()
        """What ``/metrics`` shows; collected on the event loop."""
        register(self.registry, self._counts, self._limiter, self.snapshot, loop_lag=self._lag)

    async def run(self) -> int:
        """Start, wait, stop."""
        logging.getLogger().addHandler(self._last_errors)
        try:
            return await self._run()
        finally:
            logging.getLogger().removeHandler(self._last_errors)

    async def _run(self) -> int:
        config = self._config
        self._install_signals()
        self._reports = start_error_reports(os.environ)
        self._tracing = start_tracing(os.environ, config.kafka.group_id)
        try:
            storage = self._storage = await self._open_storage()
        except (ConfigError, BackendError) as error:
            self._failed(ConfigError(f"storage cannot be used: {error}"))
            return self._exit_code
        admin = AdminServer(
            config.admin.host,
            config.admin.port,
            snapshot=self.snapshot,
            readiness=self.readiness,
            registry=self.registry,
        )
        address: dict[str, object] = {}
        if self._listens:
            try:
                address = {"admin_host": config.admin.host, "admin_port": await admin.start()}
            except OSError as error:
                where = f"{config.admin.host}:{config.admin.port}"
                log.error("admin port cannot be opened", address=where, error=str(error))  # noqa: TRY400 - no trace: it is the user's
                await storage.close()
                return USAGE
        self._lag.start()
        loop_watch = LoopWatch()
        loop_watch.start()
        log.info("started", **address, pid=os.getpid())
        sampler = asyncio.create_task(self._sample(), name="sampler")
        starting = asyncio.create_task(self._start(), name="start")
        await _first_of(starting, self._stop.wait())
        if starting.done() and not starting.cancelled() and (failure := starting.exception()) is not None:
            self._failed(failure)
        if not self._stop.is_set():
            _settle_garbage_collection()
            await self._stop.wait()
        self._state = "draining"
        log.info("stopping", exit_code=self._exit_code)
        guard = asyncio.get_running_loop().call_later(
            config.rebalance.drain_timeout + STOP_MARGIN_SECONDS, self._give_up_stopping
        )
        await _cancelled(starting)
        if self._watching is not None:
            await _cancelled(self._watching)
        await self._shut_down()
        await _cancelled(sampler)
        self._state = "stopped"
        self._lag.stop()
        loop_watch.stop()
        await self._step("admin port", admin.stop(), STEP_SECONDS)
        guard.cancel()
        log.info("stopped", exit_code=self._exit_code)
        if self._reports is not None:
            stopping = asyncio.to_thread(self._reports.stop, REPORTS_STOP_SECONDS)
            await self._step("error reports", stopping, REPORTS_STOP_SECONDS + STEP_SECONDS)
        if self._hanging:  # the end of an event loop, and of an interpreter, waits for tasks and threads
            sys.stderr.flush()
            os._exit(self._exit_code)
        return self._exit_code

    # ------------------------------------------------------------------------------------------ start

    async def _open_storage(self) -> TieredStorage:
        """Open both tiers and the change log.

        Raises:
            ConfigError, BackendError: one of them may not be used, or not by this version.
        """
        storage = self._config.storage
        high_volume = make_high_volume(storage.high_volume)
        long_term = make_long_term(
            storage.long_term, self._config.references.base_uri, at_once=self._config.concurrency.limit
        )
        change_log = make_change_log(storage.change_log)
        self._buckets = make_bucket_reader(self._config.references.allowed_prefixes, long_term)
        try:
            await open_parts(high_volume, long_term, change_log)
        except BackendUnavailable as error:
            log.warning("storage is not available yet", error=str(error))
        if self._tracing is not None:
            high_volume = self._tracing.tier(high_volume, "high_volume")
            long_term = self._tracing.tier(long_term, "long_term")
            change_log = self._tracing.tier(change_log, "change_log")
        return TieredStorage(
            high_volume,
            long_term,
            change_log,
            storage.threshold,
            handout_seconds=self._config.handout_seconds,
            observer=self._counts,
        )

    async def _start(self) -> None:
        config = self._config
        schemas = self._schemas = _schema_registry(config)
        plan = await inspect_topics(config, self._not_reached)
        response_prefix = await self._response_prefix(schemas)
        self._not_started = "starting the producer"
        publisher = self._publisher = Publisher(
            partial(make_producer, config),
            attempt_timeout_seconds=config.kafka.request_timeout,
            on_failure=self._failed,
        )
        await publisher.start()
        self._not_started = "joining the group"
        pipeline = self._pipeline(plan, publisher, response_prefix)
        poller = self._poller = Poller(
            pipeline,
            topics=config.input.topics,
            group_id=config.kafka.group_id,
            make_consumer=partial(make_consumer, config),
            ask_cluster=partial(Cluster, config),
            drain_timeout_seconds=config.rebalance.drain_timeout,
            commit_policy=CommitPolicy(config.commit.interval, config.commit.max_records),
            start=config.input.start,
            out_of_range=config.input.out_of_range,
            window_policy=config.window.policy,
            window_exhausted=config.window.exhausted,
            output_stuck=lambda: publisher.stuck,
            storage_blocked=lambda: self._storage_blocked,
            fatal=self._failed,
            poison_stops=config.dead_letter.on_limit == "stop",
            transactions=_transactions(config, plan) if config.delivery == "exactly-once" else None,
            committed_only=config.input.isolation == "read_committed",
            make_assignment=(
                Assignment
                if self._tracing is None
                else self._tracing.assignment(config.output.topic, plan.output_partitions)
            ),
        )
        await poller.start()
        self._watching = asyncio.create_task(self._watch(poller, publisher), name="watchdog")
        self._watching.add_done_callback(self._task_ended)
        self._not_started = None
        self._state = "running"

    def _not_reached(self, why: str) -> None:
        self._not_started = f"connecting to the broker: {why}"

    async def _response_prefix(self, schemas: SchemaRegistry | None) -> bytes:
        """Return what every response begins with; for that the registry has to take the responses' schema."""
        output = self._config.output
        if output.framing == "bare":
            return b""
        if output.framing == "single-object":
            return RESPONSE_PREFIX
        assert schemas is not None, "the configuration has been checked"
        self._not_started = "registering the response schema"
        return registry_prefix(await schemas.register(f"{output.topic}-value", schema_text("response")))

    def _pipeline(self, plan: TopicPlan, publisher: Publisher, response_prefix: bytes) -> Pipeline:
        config = self._config
        assert self._storage is not None
        response_bytes_max = _at_most(config.limits.response_bytes, plan.output_bytes_max, RESPONSE_OVERHEAD_BYTES)
        service = StorageService(
            _Limited(self._storage, response_bytes_max, by_reference=config.handout_seconds is not None),
            self._limiter,
            references=References(
                config.references.allowed_prefixes,
                config.limits.object_bytes,
                openers={} if self._buckets is None else {"gs": self._buckets.open_object},
            ),
            retry=RetryPolicy(
                config.retry.attempts,
                config.retry.initial,
                config.retry.max,
                config.retry.exhausted,
                config.retry.attempt_timeout,
            ),
            on_blocked=self._storage_is_blocked,
            counts=self._counts,
            object_bytes_max=config.limits.object_bytes,
            make_handler=Handler if self._tracing is None else self._tracing.handler(),
        )
        decoder = OperationDecoder(
            framing=config.input.framing,
            record_bytes_max=config.limits.record_bytes,
            object_bytes_max=config.limits.object_bytes,
            elements_max=config.limits.avro_elements,
            usecases=config.usecases,
            resolver=self._schemas,
        )

        def lane_of(topic: str, partitions: int, partition: int) -> Lane:
            return publisher.lane(topic, response_partition(partition, partitions))

        dead_letters = config.dead_letter.topic
        return Pipeline(
            service=service,
            decoder=decoder,
            budget=self._budget,
            counts=self._counts,
            response_lane=partial(lane_of, config.output.topic, plan.output_partitions),
            dead_letter_lane=(
                partial(lane_of, dead_letters, plan.dead_letter_partitions) if dead_letters is not None else None
            ),
            cluster_id=plan.cluster_id or "",
            group_id=config.kafka.group_id,
            ordering=config.ordering,
            fraction=config.window.fraction,
            copy_headers=frozenset(config.output.copy_headers),
            response_prefix=response_prefix,
            response_bytes_max=response_bytes_max,
            dead_letter_bytes_max=plan.dead_letter_bytes_max or config.limits.record_bytes + RESPONSE_OVERHEAD_BYTES,
            read_bytes=config.storage.threshold,
            derive_keys=config.storage.key_generation == "derived",
            show_keys=config.admin.show_keys,
            compacted=plan.output_compacted,
            registry=self._schemas,
            suspects=Suspects(
                notes_folder(config), cluster_id=plan.cluster_id or "", group_id=config.kafka.group_id
            ),
            poison=PoisonPolicy(
                config.dead_letter.max_consecutive, config.dead_letter.max_ratio, config.dead_letter.ratio_window
            ),
        )

    def _storage_is_blocked(self, blocked: bool) -> None:  # noqa: FBT001 - the signature of a callback
        self._storage_blocked = blocked
        if blocked:
            log.error("storage unavailable: operations wait and are tried again")
        else:
            log.info("storage is back")

    # ------------------------------------------------------------------------------------------ stop

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set() and not self._asked_to_stop:
            os._exit(128 + number)
        self._asked_to_stop = False
        log.info("signal received", signal=number.name)
        self._stop.set()

    def stop(self) -> None:
        """Begin the stop, as a first signal does; a signal that comes as well is still the first one.

        Where a supervisor and its children are all sent the same signal, as by systemd, nobody has sent a second one.
        """
        if not self._stop.is_set():
            self._asked_to_stop = True
            log.info("asked to stop")
            self._stop.set()

    def _failed(self, error: BaseException) -> None:
        """End the service because of *error*: 2 for a wrong configuration, 4 for too many poison records, else 3."""
        if self._exit_code not in {CLEAN, FAILURE}:
            return
        if isinstance(error, ConfigError):
            self._exit_code = USAGE
            log.error("cannot start", error=str(error))
        elif isinstance(error, PoisonLimitReached):
            self._exit_code = POISONED
            log.error("too many poison records: stopping", error=str(error))
        else:
            self._exit_code = FATAL
            log.critical("fatal: a restart is right", exc_info=error)
            stacks = task_stacks()
            for first in range(0, len(stacks), STACKS_A_LINE):
                log.critical("task stacks", tasks=stacks[first : first + STACKS_A_LINE])
        self._stop.set()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    async def _watch(self, poller: Poller, publisher: Publisher) -> None:
        """Show the watchdog what moves, until it trips.

        Raises:
            WatchdogTripped: something stands still, and a restart is right.
        """
        config = self._config
        watchdog = Watchdog(
            watchdog_limits(
                rebalance_timeout=config.rebalance.timeout,
                request_timeout=config.kafka.request_timeout,
                attempts=config.retry.attempts,
                attempt_timeout=config.retry.attempt_timeout,
                backoff_max=config.retry.max,
            )
        )
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for suspicion in self._suspicions(watchdog, poller, publisher):
                if not await poller.confirms(suspicion):
                    watchdog.excuse(suspicion)
                elif suspicion in self._suspicions(watchdog, poller, publisher):  # asking takes time
                    raise WatchdogTripped(suspicion.text)

    def _suspicions(self, watchdog: Watchdog, poller: Poller, publisher: Publisher) -> list[Suspicion]:
        seen = poller.observation()
        return watchdog.look(replace(seen, dead=seen.dead or publisher.dead_task()), time.monotonic())

    def _give_up_stopping(self) -> None:
        seconds = self._config.rebalance.drain_timeout + STOP_MARGIN_SECONDS
        log.error("stop deadline reached, ending at once", seconds=seconds)
        sys.stderr.flush()
        os._exit(self._exit_code or FAILURE)

    async def _shut_down(self) -> None:
        """Stop the parts in the order of the module's first lines; no step's failure keeps the next from running."""
        if self._poller is not None:
            drain = self._config.rebalance.drain_timeout if self._exit_code in {CLEAN, POISONED} else 0.0
            seconds = drain + COMMIT_TIMEOUT_SECONDS + CLIENT_STOP_SECONDS + STEP_SECONDS
            done = await self._step("poller", self._poller.stop(drain, CLIENT_STOP_SECONDS), seconds)
            if not done and self._exit_code == CLEAN:
                self._exit_code = FAILURE
        if self._schemas is not None:
            await self._step("schema registry", self._schemas.close(), STEP_SECONDS)
        if self._publisher is not None:
            stopping = self._publisher.stop(PUBLISHER_STOP_SECONDS)
            await self._step("publisher", stopping, PUBLISHER_STOP_SECONDS + 2 * STEP_SECONDS)
        if self._storage is not None:
            await asyncio.gather(
                self._step("storage's clean-ups", self._storage.join(), STORAGE_JOIN_SECONDS),
                self._stop_tracing(),
            )
            await self._step("storage", self._close_storage(self._storage), STORAGE_CLOSE_SECONDS)

    async def _stop_tracing(self) -> None:
        if self._tracing is not None:
            await self._step("traces", asyncio.to_thread(self._tracing.stop), TRACES_STOP_SECONDS)

    async def _close_storage(self, storage: TieredStorage) -> None:
        await storage.close()
        if self._buckets is not None:
            await self._buckets.close()

    async def _step(self, name: str, work: Coroutine[Any, Any, _Result], seconds: float) -> _Result | None:
        """Run one step of the stop; None where it failed, or did not end in *seconds*, which the log tells."""
        began = time.monotonic()
        step = asyncio.create_task(work, name=f"stop {name}")
        await asyncio.wait([step], timeout=seconds)
        took = round(time.monotonic() - began, 3)
        if not step.done():
            self._hanging.append(name)
            log.error("stop step did not end in time: going on without it", step=name, seconds=took)
            step.cancel()
            return None
        log.debug("stop step ended", step=name, seconds=took)
        if step.cancelled() or (error := step.exception()) is not None:
            log.error("stop step failed", step=name, exc_info=None if step.cancelled() else error)
            return None
        return step.result()

    # ------------------------------------------------------------------------------------------ what can be seen

    def snapshot(self) -> DebugState:
        """Describe the service (contract 8)."""
        limiter, poller = self._limiter, self._poller
        state: Any = self._state
        if state == "running" and poller is not None and poller.rebalancing:
            state = "rebalancing"
        storage = self._config.storage
        return {
            "state": state,
            "limiter": {
                "limit": limiter.limit,
                "in_use": limiter.in_use,
                "available": limiter.available,
                "queued": limiter.queued,
            },
            "partitions": [self._with_records(one) for one in poller.snapshot()] if poller is not None else [],
            "totals": self._counts.totals(),
            "storage": {
                "high_volume": storage.high_volume.type,
                "long_term": storage.long_term.type,
                "change_log": storage.change_log.type,
                "change_log_entries": self._change_log_entries,
                "blocked": self._storage_blocked,
                "traffic": self._counts.traffic(),
            },
            "in_flight_bytes": self._budget.used,
            "last_errors": self._last_errors.newest(),
        }

    def _with_records(self, partition: PartitionState) -> PartitionState:
        counts = self._counts.partition(partition["topic"], partition["partition"])
        return {**partition, "records": counts.operations + counts.poison}

    def readiness(self) -> tuple[bool, list[str]]:
        """Whether the service is ready, and the reasons where it is not."""
        reasons = self._reasons()
        return not reasons, reasons

    def _reasons(self) -> list[str]:
        if self._state in {"draining", "stopped"}:
            return [self._state]
        if self._not_started is not None:
            return [self._not_started]
        reasons = self._poller.not_ready() if self._poller is not None else []
        if self._publisher is not None and self._publisher.stuck:
            reasons.append("responses are not being acknowledged")
        if self._storage_blocked:
            reasons.append("storage unavailable")
        if self._schemas is not None and self._schemas.waiting:
            reasons.append("schema registry unavailable")
        return reasons

    async def _sample(self) -> None:
        assert self._storage is not None
        while True:
            with suppress(Exception):  # unknown is a value here; storage reports its own faults
                async with asyncio.timeout(SAMPLE_SECONDS):
                    self._change_log_entries = await self._storage.change_log.count()
            await asyncio.sleep(SAMPLE_SECONDS)


def notes_folder(config: Config) -> Path:
    """Return where it is noted what is being decoded: beside the data, where there is any on this machine.

    Else below the system's temporary folder, where each user has one.
    """
    storage = config.storage
    for tier in (storage.high_volume, storage.change_log, storage.long_term):
        path = getattr(tier, "path", None)
        if path is not None:
            return Path(path).absolute().parent / "decoding"
    return Path(tempfile.gettempdir()) / f"tierstream-decoding-{os.getuid()}"


def _at_most(limit: int, topic_limit: int | None, overhead: int) -> int:
    """Return *limit*, lowered to what a topic takes beside *overhead*."""
    return limit if topic_limit is None else max(0, min(limit, topic_limit - overhead))


def _transactions(config: Config, plan: TopicPlan) -> Transactions:
    def target_in(topic: str, partitions: int, partition: int) -> TopicPartition:
        return TopicPartition(topic, response_partition(partition, partitions))

    dead_letters = config.dead_letter.topic
    return Transactions(
        group_id=config.kafka.group_id,
        ask_cluster=partial(Cluster, config),
        make_producer=partial(make_transactional_producer, config),
        interval_seconds=config.commit.transaction_interval,
        output=partial(target_in, config.output.topic, plan.output_partitions),
        dead_letters=None if dead_letters is None else partial(target_in, dead_letters, plan.dead_letter_partitions),
    )


def _schema_registry(config: Config) -> SchemaRegistry | None:
    settings = config.schema_registry
    if settings.url is None:
        return None
    return SchemaRegistry(
        settings.url,
        username=settings.username,
        password=settings.password.get() if settings.password is not None else None,
        bearer_token=settings.bearer_token.get() if settings.bearer_token is not None else None,
        ssl_ca_file=settings.ssl_ca_file,
        depth_max=config.limits.avro_depth,
    )


async def _first_of(task: asyncio.Task[None], other: Awaitable[object]) -> None:
    """Wait until *task* has ended or *other* has; *other* is cancelled, *task* goes on."""
    waiting = asyncio.ensure_future(other)
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    await asyncio.wait([waiting])


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task of our own and wait for its end, whatever it was."""
    task.cancel()
    await asyncio.wait([task])


def _settle_garbage_collection() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 100)
