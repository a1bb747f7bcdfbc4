"""Throughput of the service against a bare client loop, on the same broker and the same records, in one run.

1. A broker (embedded, unless one is given), an input topic filled once with inserts.
2. In turns, each in a process of its own, from the first record on:

   * *bare*: the loop most people write: ``getmany``, fastavro decode, fastavro encode of a response, ``send``, await
     all of them, commit;
   * *service*: ``tierstream run`` with memory tiers: window, ordering by key, storage, indexed responses with headers,
     packed batches, watermark commits.

3. Each is timed from outside, by the end offsets of its output topic, between the first responses and the last one, so
   that start-up counts for neither. CPU is what the operating system charged to the process meanwhile.
4. The stages of the service are timed one by one in this process, without a broker.
5. On request (*profile*) the service runs once more and samples itself (:mod:`consumer.profiling`): what a record costs
   in each stage, and with it how fast the service could be at most by that stage alone, its *limit*.

Rates of different runs and machines cannot be compared; the ratio within one run can.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError
from fastavro import parse_schema, schemaless_reader, schemaless_writer

from consumer.avro_schemas import schema_text
from consumer.broker import DevBroker
from consumer.codec import OperationDecoder, ResponseEncoder, encode_operation
from consumer.errors import TierstreamError
from consumer.executor import Outcome
from consumer.ids import ObjectContext
from consumer.lifeline import dies_with
from consumer.operations import DEFAULT_METADATA, Insert, Operation
from consumer.permits import ConcurrencyLimiter
from consumer.profiling import STAGES
from consumer.responses import ResponseHeaders
from consumer.service import StorageService
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage

WARM_SHARE = 0.1
"""Share of the responses that is not timed: the processes' first batches run on cold caches."""
LOOK_SECONDS = 0.02
"""How often the end offsets of the output are looked at: two hundredths of a run of a second."""
RUN_SECONDS_MAX = 300.0
"""Longest run of one process before the measurement fails."""
BATCH_BYTES = 512 * 1024
OBJECTS = 10_000
"""Different keys: later inserts replace earlier ones, so that the memory tiers do not grow with the records."""
STAGE_RECORDS = 20_000
COMPRESSION = "lz4"
"""The service's default; the bare loop uses it too."""


@dataclass
class Run:
    """One process over all records."""

    records_per_second: float
    cpu_microseconds: float
    """CPU time a record, in this process alone."""
    rss_mib: float
    """Largest resident memory."""


@dataclass
class Profile:
    """One run of the service, sampled."""

    run: Run
    samples: dict[str, int]
    """By stage."""

    @property
    def microseconds(self) -> dict[str, float]:
        """CPU time a record by stage; their sum is all of it."""
        count = sum(self.samples.values())
        return {stage: self.run.cpu_microseconds * self.samples.get(stage, 0) / count for stage in STAGES}


@dataclass
class Report:
    """What was measured."""

    records: int
    partitions: int
    payload_bytes: int
    latency_ms: float = 0.0
    """What an operation waits for, on both sides."""
    bare: list[Run] = field(default_factory=list)
    service: list[Run] = field(default_factory=list)
    exactly_once: list[Run] = field(default_factory=list)
    """The service again, writing in transactions; empty unless asked for."""
    profile: Profile | None = None
    """What a record costs by stage of the running service; None unless asked for."""
    stages_microseconds: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median records a second of the service over that of the bare loop."""
        return _median(self.service, "records_per_second") / _median(self.bare, "records_per_second")

    @property
    def cpu_ratio(self) -> float:
        """Median CPU a record of the bare loop over that of the service; above 1 the service needs less."""
        return _median(self.bare, "cpu_microseconds") / _median(self.service, "cpu_microseconds")


class BenchFailure(TierstreamError):
    """There is nothing to report."""


def _median(runs: list[Run], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def main(
    *,
    bootstrap: str | None = None,
    records: int = 200_000,
    partitions: int = 8,
    payload_bytes: int = 1024,
    rounds: int = 3,
    exactly_once: bool = False,
    latency_ms: float = 0.0,
    profile: bool = False,
    as_json: bool = False,
) -> int:
    """Measure, print the report on stdout and progress on stderr; return the exit code.

    Args:
        bootstrap: A broker to use; None starts the embedded one.
        records: Records for each process of each round.
        partitions: Of every topic.
        payload_bytes: Of every insert.
        rounds: How often each side runs.
        exactly_once: Also measure the service with ``delivery: exactly-once``.
        latency_ms: Milliseconds that each operation waits.
        profile: Also tell what a record costs in each stage of the running service.
        as_json: Print JSON instead of a table.

    Raises:
        BrokerFailure: the embedded broker did not start.
        BenchFailure: the broker cannot be used, or a process ended or took too long.
    """
    report = Report(records, partitions, payload_bytes, latency_ms)
    try:
        asyncio.run(_measure(report, bootstrap, rounds, exactly_once=exactly_once, profile=profile))
    except KafkaError as error:
        where = "the embedded broker" if bootstrap is None else bootstrap
        raise BenchFailure(
            f"{where} cannot be used: {type(error).__name__}",
            "it has to run, to be reached without TLS or password, and to let topics be created",
        ) from error
    except TimeoutError as error:
        raise BenchFailure(f"a process took more than {RUN_SECONDS_MAX:g} s", "fewer --records") from error
    if as_json:
        figures = {**asdict(report), "ratio": report.ratio, "cpu_ratio": report.cpu_ratio}
        if report.profile is not None:
            figures["profile"] |= {"microseconds": report.profile.microseconds}
        print(orjson.dumps(figures, option=orjson.OPT_INDENT_2).decode())  # noqa: T201 - the command's output
    else:
        _print(report)
    return 0


def _print(report: Report) -> None:
    work = f"{report.records} inserts of {report.payload_bytes} bytes, {report.partitions} partitions"
    lines = [
        work + (f", operations of {report.latency_ms:g} ms" if report.latency_ms else ""),
        f"medians of {len(report.bare)} rounds",
        "",
        f"{'':14}{'records/s':>12}{'CPU us/record':>16}{'memory MiB':>13}",
    ]
    lines += [
        f"{name:14}{_median(runs, 'records_per_second'):12,.0f}{_median(runs, 'cpu_microseconds'):16.1f}"
        f"{_median(runs, 'rss_mib'):13.0f}"
        for name, runs in (
            ("bare loop", report.bare),
            ("service", report.service),
            ("exactly-once", report.exactly_once),
        )
        if runs
    ]
    verdict = f"{report.ratio:.2f} x the records per second, 1/{report.cpu_ratio:.2f} of the CPU a record"
    lines += ["", f"service / bare loop: {verdict}", ""]
    lines.append("stages of the service, one by one, CPU microseconds a record:")
    lines += [f"  {name:44}{cost:6.2f}" for name, cost in report.stages_microseconds.items()]
    if report.profile is not None:
        lines += ["", *_profile_lines(report.profile)]
    print("\n".join(lines))  # noqa: T201 - the command's output


def _profile_lines(profile: Profile) -> list[str]:
    costs, rate = profile.microseconds, profile.run.records_per_second
    lines = [
        f"the running service by stage, {sum(profile.samples.values()):,} samples at {rate:,.0f} records/s:",
        f"  {'':12}{'CPU us/record':>14}{'share':>8}{'limit, records/s':>18}{'left to it':>12}",
    ]
    for stage, cost in costs.items():
        line = f"  {stage:12}{cost:14.2f}{cost / profile.run.cpu_microseconds:8.1%}"
        lines.append(line + (f"{1e6 / cost:18,.0f}{1e6 / cost / rate:10.1f} x" if cost else f"{'-':>18}{'-':>12}"))
    total = profile.run.cpu_microseconds
    return [*lines, f"  {'all':12}{total:14.2f}{1:8.0%}{1e6 / total:18,.0f}{1e6 / total / rate:10.1f} x"]


async def _measure(report: Report, bootstrap: str | None, rounds: int, *, exactly_once: bool, profile: bool) -> None:
    records, partitions, payload_bytes = report.records, report.partitions, report.payload_bytes
    sides = [("bare", report.bare), ("service", report.service)]
    if exactly_once:
        sides.append(("exactly-once", report.exactly_once))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierstream-bench-")))
        if bootstrap is None:
            broker = DevBroker(folder / "broker")
            await asyncio.to_thread(broker.start)
            stack.push_async_callback(asyncio.to_thread, broker.stop)
            bootstrap = broker.bootstrap
        mark = f"bench-{os.getpid()}"
        topic = f"{mark}-operations"
        await _create(bootstrap, [topic], partitions)
        _say(f"filling {topic} with {records} records")
        await _fill(bootstrap, topic, records, partitions, payload_bytes)
        for number in range(1, rounds + 1):
            for name, runs in sides:
                output = f"{mark}-{name}-{number}"
                await _create(bootstrap, [output], partitions)
                command = [sys.executable, "-m", "consumer.bench", bootstrap, topic, output, str(report.latency_ms)]
                if name != "bare":
                    delivery = "at-least-once" if name == "service" else name
                    config = _configure(folder, bootstrap, topic, output, delivery, report.latency_ms)
                    command = [sys.executable, "-m", "consumer", "run", "--config", str(config)]
                runs.append(await _timed(command, folder / f"{output}.log", bootstrap, output, records, partitions))
                _say(f"round {number}, {name}: {runs[-1].records_per_second:,.0f} records/s")
        if profile:
            output, samples = f"{mark}-profile", folder / "samples.json"
            await _create(bootstrap, [output], partitions)
            config = _configure(folder, bootstrap, topic, output, "at-least-once", report.latency_ms)
            command = [sys.executable, "-m", "consumer.profiling", str(config), str(samples)]
            log = folder / f"{output}.log"
            run = await _timed(command, log, bootstrap, output, records, partitions, sampled=samples)
            report.profile = Profile(run, orjson.loads(await asyncio.to_thread(samples.read_bytes)))
            _say(f"profile: {run.records_per_second:,.0f} records/s")
    _say("timing the stages")
    report.stages_microseconds = await time_stages(payload_bytes)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


async def _create(bootstrap: str, topics: list[str], partitions: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, partitions, 1) for topic in topics])
    finally:
        await admin.close()


async def _fill(bootstrap: str, topic: str, records: int, partitions: int, payload_bytes: int) -> None:
    context = ObjectContext("bench")
    payload = os.urandom(payload_bytes)
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, max_batch_size=BATCH_BYTES, linger_ms=0)
    await producer.start()
    try:
        batch, open_partition, number, pending = producer.create_batch(), 0, 0, []
        while number < records:
            key = f"object-{number % OBJECTS}"
            value = encode_operation(Insert(context, key, DEFAULT_METADATA, payload), None)
            if batch.append(key=key.encode(), value=value, timestamp=int(time.time() * 1000)) is None:
                pending.append(await producer.send_batch(batch, topic, partition=open_partition))
                open_partition = (open_partition + 1) % partitions
                batch = producer.create_batch()
                continue
            number += 1
        pending.append(await producer.send_batch(batch, topic, partition=open_partition))
        await asyncio.gather(*pending)
    finally:
        await producer.stop()


def _configure(
    folder: Path, bootstrap: str, topic: str, output: str, delivery: str, latency_ms: float
) -> Path:
    path = folder / f"{output}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "kafka": {"bootstrap_servers": [bootstrap], "group_id": output},
                "input": {"topics": [topic]},
                "output": {"topic": output, "compression": COMPRESSION, "max_request_bytes": "3MiB"},
                "dead_letter": {"topic": None},
                "delivery": delivery,
                "storage": {
                    "high_volume": {"type": "memory", "latency": f"{latency_ms}ms"},
                    "long_term": {"type": "memory"},
                    "change_log": {"type": "memory"},
                },
                "admin": {"port": 0},
                "log": {"level": "warning", "format": "json"},
            }
        )
    )
    return path


async def _timed(
    command: list[str],
    log: Path,
    bootstrap: str,
    output: str,
    records: int,
    partitions: int,
    *,
    sampled: Path | None = None,
) -> Run:
    """Run *command* until *output* holds a response for each record; time it from outside.

    One that samples itself is told when the time begins and ends, and writes what it counted to *sampled*.

    Raises:
        BenchFailure: the process ended before that, or takes too long.
    """
    watcher = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await watcher.start()
    ends = [TopicPartition(output, partition) for partition in range(partitions)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIERSTREAM_")}
    environment["TMPDIR"] = str(log.parent)  # the notes of a group that will never be there again
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command, stderr=stderr, env=environment, preexec_fn=dies_with(os.getpid())
        )
        try:
            began, first, cpu_before = 0.0, 0, 0.0
            async with asyncio.timeout(RUN_SECONDS_MAX):
                while True:
                    if process.returncode is not None:
                        raise BenchFailure(f"a process ended with {process.returncode}: {_tail(log)}")
                    answered = sum((await watcher.end_offsets(ends)).values())
                    if not began and answered >= records * WARM_SHARE:
                        began, first, cpu_before = time.perf_counter(), answered, _cpu_seconds(process.pid)
                        if sampled is not None:
                            process.send_signal(signal.SIGUSR2)
                    if answered >= records:
                        seconds, cpu = time.perf_counter() - began, _cpu_seconds(process.pid) - cpu_before
                        if sampled is not None:
                            process.send_signal(signal.SIGUSR2)
                            while not await asyncio.to_thread(sampled.exists):  # noqa: ASYNC110 - another process writes it
                                await asyncio.sleep(LOOK_SECONDS)
                        return Run(
                            records_per_second=(answered - first) / seconds,
                            cpu_microseconds=cpu / (answered - first) * 1e6,
                            rss_mib=_peak_mib(process.pid),
                        )
                    await asyncio.sleep(LOOK_SECONDS)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 20)
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            await watcher.stop()


def _tail(log: Path) -> str:
    return log.read_text()[-2000:]


def _family(pid: int) -> list[int]:
    """Return a process and the ones it has started: a service may be several."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *[one for child in children for one in _family(int(child))]]


def _cpu_seconds(pid: int) -> float:
    ticks = 0
    for one in _family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> float:
    peak = 0.0
    for one in _family(pid):
        status = Path(f"/proc/{one}/status").read_text()
        peak += next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return peak


# --------------------------------------------------------------------------------------------- the bare loop


def plain_consumer(bootstrap: str, topic: str, group: str) -> AIOKafkaConsumer:
    """Make the unstarted consumer of a bare loop: it fetches as the service does, and commits nothing by itself."""
    return AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_bytes=8 * 1024 * 1024,
    )


async def bare_loop(bootstrap: str, topic: str, output: str, latency_ms: float) -> None:
    """Consume, decode, wait, answer, await, commit: the loop most people write; until it is stopped."""
    operation_schema = parse_schema(orjson.loads(schema_text("operation")))
    response_schema = parse_schema(orjson.loads(schema_text("response")))
    consumer = plain_consumer(bootstrap, topic, output)
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        acks="all",
        enable_idempotence=True,
        compression_type=COMPRESSION,
        max_batch_size=BATCH_BYTES,
    )
    await consumer.start()
    await producer.start()
    while True:
        fetched = await consumer.getmany(timeout_ms=200, max_records=2_000)
        sent = []
        if latency_ms:
            await asyncio.gather(*[asyncio.sleep(latency_ms / 1000) for some in fetched.values() for _ in some])
        for partition, records in fetched.items():
            for record in records:
                operation: Any = schemaless_reader(BytesIO(record.value or b""), operation_schema, None)
                response = BytesIO()
                answer = plain_response(operation, record.topic, record.partition, record.offset)
                schemaless_writer(response, response_schema, answer)
                sent.append(
                    await producer.send(output, response.getvalue(), key=record.key, partition=partition.partition)
                )
        if sent:
            await asyncio.gather(*sent)
            await consumer.commit()


def plain_response(operation: Any, topic: str, partition: int, offset: int) -> dict[str, Any]:
    """Return what the bare loop answers to an insert, as fastavro takes and gives both."""
    body = operation["body"]
    inserted = {"metadata": {**body["metadata"], "size": len(body["payload"])}}
    return {
        "index": offset,
        "source": {"topic": topic, "partition": partition, "offset": offset},
        "request_id": operation["request_id"],
        "context": operation["context"],
        "kind": "insert",
        "key": body["key"],
        "status": 201,
        "result": ("tierstream.v1.Inserted", inserted),
        "completed_at": time.time_ns() // 1000,
    }


# --------------------------------------------------------------------------------------------- the stages


async def time_stages(payload_bytes: int) -> dict[str, float]:
    """Time each stage of the service by itself over the same inserts; return CPU microseconds a record by name."""
    context = ObjectContext("bench")
    payload = os.urandom(payload_bytes)
    values = [
        encode_operation(Insert(context, f"object-{number}", DEFAULT_METADATA, payload), None)
        for number in range(STAGE_RECORDS)
    ]
    decoder, encoder = OperationDecoder(), ResponseEncoder("operations", 0)
    storage = TieredStorage(MemoryBackend(), MemoryBackend())
    service = StorageService(storage, ConcurrencyLimiter(500))
    producer = AIOKafkaProducer(max_batch_size=BATCH_BYTES)
    headers = ResponseHeaders("operations", 0)
    now = time.time_ns() // 1000

    decoded = [decoder.decode(value, ()) for value in values]
    operations: list[Operation] = [one.operation for one in decoded if one.operation is not None]

    async def over() -> bool:
        return False

    async def execute(service: StorageService, number: int) -> tuple[float, list[Outcome]]:
        gc.collect()
        outcomes: list[Outcome] = []
        items = enumerate(operations[:number])
        began = time.process_time()
        async with service.stream(ordering="key") as executor:
            await executor.serve(partial(next, items, None), over, lambda *outcome: outcomes.append(outcome))
        return (time.process_time() - began) / number * 1e6, outcomes

    costs: dict[str, float] = {}
    costs["decode (bytes to operation, checked)"] = _cost(lambda: [decoder.decode(value, ()) for value in values])
    costs["execute (window, key order, memory tier)"], outcomes = await execute(service, STAGE_RECORDS)
    slow = StorageService(TieredStorage(MemoryBackend(latency=0.001), MemoryBackend()), ConcurrencyLimiter(500))
    costs["execute, where storage takes 1 ms"], _ = await execute(slow, STAGE_RECORDS // 4)
    await slow.join()
    pairs = [(index, decoded[index], outcome) for index, outcome in outcomes]
    costs["encode (outcome to bytes)"] = _cost(
        lambda: [encoder.encode(index, one, outcome, now) for index, one, outcome in pairs]
    )
    costs["headers"] = _cost(lambda: [headers.make(index, 201, "insert", b"key", ()) for index, _, _ in pairs])
    answers = [
        (*headers.make(index, 201, "insert", b"key", ()), encoder.encode(index, one, outcome, now)[1])
        for index, one, outcome in pairs
    ]

    def pack() -> None:
        batch = producer.create_batch()
        for key, made, value in answers:
            if batch.append(timestamp=now // 1000, key=key, value=value, headers=made) is None:
                batch.close()
                batch = producer.create_batch()
                batch.append(timestamp=now // 1000, key=key, value=value, headers=made)
        batch.close()

    costs["pack (into batches)"] = _cost(pack)
    await service.join()
    await producer.stop()
    return costs


def _cost(work: Callable[[], object]) -> float:
    """Microseconds a record of *work* over :data:`STAGE_RECORDS` records; the best of three, as the rest is noise."""
    best = float("inf")
    for _ in range(3):
        gc.collect()
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best / STAGE_RECORDS * 1e6


if __name__ == "__main__":
    asyncio.run(bare_loop(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
