"""How cost and speed grow with what there is more of: ``make bench-growth``, which writes ``docs/growth.md``.

1. Apache Kafka is started as for the table of peers, once. Each part of the table has its input topics, filled once.
2. The service runs with memory tiers, as shipped otherwise, over all records; ``BENCH_ROUNDS`` times (3), the rows of a
   part interleaved, each in a process of its own, timed from outside as in :mod:`consumer.bench`. Medians.
3. *Partitions*, *window*, *payload*: CPU a record, and rate, over those of the part's base row. What is not flat has a
   reason beside it.
4. *Distance*: what one commit takes where one record is stuck and every second one above it is finished, the worst an
   offset map can be, timed in this process; and over the records that the service works off between two commits.
5. *Poison*: how fast one partition is beside another that holds nothing but poison, and how fast where that one is
   empty; with a tier in memory and with sqlite. With a share of a core, as below, so that only the process decides.
6. *Processes*: a sqlite tier, as memory is nobody else's, under ``runtime.processes``. CPU and memory of all together.
   Once with what the machine has, and once (*cores*; takes root and control groups) with a share of a core for each
   process, so small that broker and processes never want more than there is.
7. *Latency at half load*: records are produced at half of the rate that the service has just reached, one by one; from
   the time at which the broker has a record to that at which it has its response, both by the broker's clock. In turns
   with it, the same for :mod:`echo_loop`, which does nothing but answer: what broker, client and machine take by
   themselves. How late the producer was, and what other processes took of the cores, stands beside it: either is a
   pause, and the records that it holds up then come in one burst.

Rates of different runs and machines cannot be compared; the ratio within one run can.
"""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from brokers import kafka_version, maven_broker
from consumer import bench
from consumer.bench import Run
from consumer.codec import encode_operation
from consumer.ids import ObjectContext
from consumer.kafka.publisher import PACE_SECONDS
from consumer.offset_map import encode
from consumer.offsets import DISTANCE_MAX, OffsetTracker
from consumer.operations import DEFAULT_METADATA, Insert

BROKER = ("-XX:TieredStopAtLevel=4", "-Xms2g", "-Xmx2g", "-Xmn1500m", "-XX:+AlwaysPreTouch")
"""Of the broker's virtual machine: it is to be out of the way. A collection stops it for some 10 ms, whatever there is
to collect and by whichever collector; with so much room for what is young there is one in 15 s instead of in 3."""
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
RECORDS = int(os.environ.get("BENCH_RECORDS", "64000"))
DOCUMENT = Path(__file__).parents[1] / "docs" / "growth.md"
OBJECTS = 10_000
PARTITIONS = 8
INPUT_BYTES_MAX = 256 * 1024 * 1024
"""Of one input topic: large payloads have fewer records."""
ECHO_LOOP = Path(__file__).with_name("echo_loop.py")
COMMIT_SECONDS = 5
"""Between two commits, as shipped."""
PARTITION_RATE = 4_000
"""Records a second of a partition, by which the cost of a commit is divided."""
PROCESS_CORES = 0.25
"""Of each process where cores are shared out: two of them, and what the broker takes for their load, fit two cores."""
CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup/cpu"), {"cpu.cfs_period_us": "{period}", "cpu.cfs_quota_us": "{quota}"}),
    (Path("/sys/fs/cgroup"), {"cpu.max": "{quota} {period}"}),
)
"""Where control groups are made, of the older kind and of the newer, and what limits their CPU time."""
QUOTA_PERIOD_MICROSECONDS = 10_000
"""Short: a process that has used its share stands still for the rest of the period."""
HALF_LOAD_SECONDS = 5.0
WARM_SECONDS = 1.5
"""Of half load before that, so that every object has been there once: a store that grows is a pause of its own."""
GOES_FIRST = "They had what this left, which ran before any of them: `chrt --rr 2 make bench-growth`."
"""Said where it was so: on a shared machine the turns of the neighbours are the last hundredth."""
TICK_SECONDS = 0.001
"""Records of half load are produced this often, as many as are due."""


@dataclass
class Row:
    """One setting of one part, and its runs."""

    name: str
    topic: str
    partitions: int
    records: int
    sections: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    cores: float | None = None
    """What its processes may take together; None: what they get."""
    poison: int | None = None
    """Records in one partition more, which is not timed, that are no operations; None: there is no such partition."""
    runs: list[Run] = field(default_factory=list)
    answered_beside: list[int] = field(default_factory=list)
    """How many records of *poison* each run answered."""

    def median(self, quantity: str) -> float:
        """Return the middle of the runs."""
        return float(statistics.median(getattr(run, quantity) for run in self.runs))


@dataclass
class Part:
    """Rows that are compared with one of them."""

    name: str
    says: str
    rows: list[Row]
    base: int

    def table(self) -> list[str]:
        """Return the rows as Markdown."""
        base = self.rows[self.base]
        lines = [
            f"## {self.name}",
            "",
            self.says,
            "",
            "| | records/s | rate, ratio | CPU µs a record | CPU, ratio | peak MiB | |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for row in self.rows:
            rate, cpu = row.median("records_per_second"), row.median("cpu_microseconds")
            lines.append(
                f"| {row.name} | {rate:,.0f} | {rate / base.median('records_per_second'):.2f} | {cpu:.1f} |"
                f" {cpu / base.median('cpu_microseconds'):.2f} | {row.median('rss_mib'):.0f} | {row.reason} |"
            )
        return [*lines, ""]


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201 - a program, whose output this is


async def filled(bootstrap: str, topic: str, partitions: int, records: int, payload_bytes: int) -> str:
    """Create *topic* with inserts, as many in each partition."""
    return await filled_beside(bootstrap, topic, partitions, records, payload_bytes, ())


async def filled_beside(
    bootstrap: str, topic: str, partitions: int, records: int, payload_bytes: int, poison: Sequence[int]
) -> str:
    """Create *topic* with inserts, as many in each partition, and one partition more for each number in *poison*.

    These have so many records of the same size that are no operations, as their last byte is missing.
    """
    await bench._create(bootstrap, [topic], partitions + len(poison))
    payload, context = os.urandom(payload_bytes), ObjectContext("bench")
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, max_batch_size=4 * 1024 * 1024, max_request_size=8 * 1024 * 1024
    )
    await producer.start()
    try:
        for partition in range(partitions + len(poison)):
            numbers = range(partition, records, partitions)
            if partition >= partitions:
                numbers = range(poison[partition - partitions])
            batch = producer.create_batch()
            for number in numbers:
                key = f"object-{number % OBJECTS}"
                value = encode_operation(Insert(context, key, DEFAULT_METADATA, payload), None)
                if partition >= partitions:
                    value = value[:-1]
                now = time.time_ns() // 1_000_000
                while batch.append(key=key.encode(), value=value, timestamp=now) is None:
                    await (await producer.send_batch(batch, topic, partition=partition))
                    batch = producer.create_batch()
            if batch.record_count():
                await (await producer.send_batch(batch, topic, partition=partition))
    finally:
        await producer.stop()
    return topic


async def run(bootstrap: str, folder: Path, row: Row, number: int) -> Run:
    """Run the service once over the records of *row*.

    Raises:
        BenchFailure: the poison beside them ran out.
    """
    output = f"{row.topic}-{row.name.replace(' ', '')}-{number}"
    await bench._create(bootstrap, [output], row.partitions + (row.poison is not None))
    config = configured(bootstrap, folder, row, output)
    command = [sys.executable, "-m", "consumer", "run", "--config", str(config)]
    with limited(command, row.cores) as command:
        made = await bench._timed(command, folder / f"{output}.log", bootstrap, output, row.records, row.partitions)
    if row.poison:
        answered = await end_of(bootstrap, TopicPartition(output, row.partitions))
        if answered >= row.poison:
            raise bench.BenchFailure(f"{row.name}: no poison was left at the end")
        row.answered_beside.append(answered)
    say(f"{row.name:>26}: {made.records_per_second:9,.0f}/s {made.cpu_microseconds:7.1f} us {made.rss_mib:6.0f} MiB")
    return made


async def end_of(bootstrap: str, partition: TopicPartition) -> int:
    """Return where *partition* ends."""
    client = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await client.start()
    try:
        end: int = (await client.end_offsets([partition]))[partition]
        return end
    finally:
        await client.stop()


@contextmanager
def limited(command: list[str], cores: float | None) -> Iterator[list[str]]:
    """Give the command that runs *command*, and what it starts, in a control group of *cores*.

    Raises:
        OSError: there are no control groups, or none that may be made here.
    """
    if cores is None:
        yield command
        return
    for root, limits in CONTROL_GROUPS:
        group = root / f"tierstream-growth-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if all((group / name).exists() for name in limits):
                break
            group.rmdir()
    else:
        raise OSError("no control group for CPU time can be made here: it takes root, and cgroups")
    try:
        quota = int(cores * QUOTA_PERIOD_MICROSECONDS)
        for name, value in limits.items():
            (group / name).write_text(value.format(period=QUOTA_PERIOD_MICROSECONDS, quota=quota))
        yield ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
    finally:
        group.rmdir()


def configured(bootstrap: str, folder: Path, row: Row, output: str) -> Path:
    """Write the configuration of one run."""
    path = bench._configure(folder, bootstrap, row.topic, output, "at-least-once", 0.0)
    config = yaml.safe_load(path.read_text())
    config["window"] = {"policy": "equal-share"}
    for name, section in row.sections.items():
        config[name] = {**config.get(name, {}), **section}
    path.write_text(yaml.safe_dump(config))
    return path


async def interleaved(bootstrap: str, folder: Path, rows: Sequence[Row]) -> None:
    """Run all rows, in turns."""
    for number in range(ROUNDS):
        for row in rows:
            row.runs.append(await run(bootstrap, folder, row, number))


def latency(milliseconds: int) -> dict[str, Any]:
    """Return the tier whose operations take so long."""
    return {"high_volume": {"type": "memory", "latency": f"{milliseconds}ms"}}


def on_disk(folder: Path, name: str) -> dict[str, Any]:
    """Return tiers of their own on the disk."""
    return {
        "high_volume": {"type": "sqlite", "path": str(folder / f"{name}.sqlite")},
        "long_term": {"type": "filesystem", "path": str(folder / f"{name}-files")},
        "change_log": {"type": "sqlite", "path": str(folder / f"{name}-log.sqlite")},
    }


async def by_partitions(bootstrap: str, _folder: Path) -> Part:
    """The same records in more and more partitions."""
    rows = []
    for count in (1, 8, 64, 256):
        topic = await filled(bootstrap, f"partitions-{count}", count, RECORDS, 1024)
        rows.append(Row(f"{count}", topic, count, RECORDS))
    rows[-1].reason = "smaller fetches and batches, and a window of 1 or 2; each partition has its buffer"
    says = f"{RECORDS:,} records of 1 KiB, operations that do not wait, 500 permits in equal shares."
    return Part("Partitions", says, rows, 1)


async def by_window(bootstrap: str, _folder: Path) -> Part:
    """Larger and larger windows, for operations that wait."""
    rows = []
    for window in (1, 10, 62, 250, 1000):
        count = min(RECORDS, PARTITIONS * window * 1000)
        topic = await filled(bootstrap, f"window-{window}", PARTITIONS, count, 1024)
        sections = {"storage": latency(5), "concurrency": {"limit": window * PARTITIONS}}
        bound = PARTITIONS * window / 0.005
        rows.append(Row(f"{window}", topic, PARTITIONS, count, sections, f"at most {bound:,.0f}/s at 5 ms"))
    rows[0].reason += "; each record is a turn of the loop, a batch and a request of its own"
    says = f"Operations of 5 ms, {PARTITIONS} partitions; a window of *n* allows {PARTITIONS} * n / 5 ms."
    return Part("Window", says, rows, 2)


async def by_payload(bootstrap: str, _folder: Path) -> Part:
    """Larger and larger objects."""
    rows = []
    bytes_decide = "the bytes decide: fetched, checked (CRC-32C) and copied, 2 µs for a KiB"
    for name, size, reason in (
        ("100 B", 100, ""),
        ("1 KiB", 1024, ""),
        ("10 KiB", 10_240, ""),
        ("100 KiB", 102_400, bytes_decide),
        ("1 MiB", 1_048_576, bytes_decide),
    ):
        count = min(RECORDS, INPUT_BYTES_MAX // size)
        topic = await filled(bootstrap, f"payload-{size}", PARTITIONS, count, size)
        rows.append(Row(name, topic, PARTITIONS, count, reason=reason))
    says = "Operations that do not wait, 8 partitions; memory holds the objects too."
    return Part("Payload", says, rows, 1)


async def by_processes(bootstrap: str, folder: Path, cores: float | None = None) -> Part:
    """One process and two, on one database; with so many *cores* each, or with what there is."""
    name, kind = ("Processes", "processes") if cores is None else ("Processes with cores of their own", "cores")
    topic = await filled(bootstrap, kind, PARTITIONS, RECORDS, 1024)
    rows = []
    for count in (1, 2):
        sections = {"storage": on_disk(folder, f"{kind}-{count}"), "runtime": {"processes": count}}
        together = None if cores is None else count * cores
        rows.append(Row(f"{count}", topic, PARTITIONS, RECORDS, sections, cores=together))
    if cores is None:
        rows[1].reason = "the broker, and one writer at a time in the database, leave it no more"
        return Part(name, "A sqlite tier; CPU and memory of all processes together.", rows, 0)
    says = f"The same, but each process may take {cores} of a core, so that the broker leaves them what they may take."
    return Part(name, says, rows, 0)


async def beside_poison(bootstrap: str, folder: Path) -> list[str]:
    """One partition beside an empty one, and beside one of nothing but poison; in memory, and on a disk."""
    lines: list[str] = []
    for kind in ("memory", "sqlite"):
        rows = []
        for name, poison in (("an empty one", 0), ("nothing but poison", RECORDS // 2)):
            topic = await filled_beside(bootstrap, f"poison-{kind}-{poison}", 1, RECORDS, 1024, [poison])
            await bench._create(bootstrap, [f"{topic}-dead"], 2)
            sections: dict[str, Any] = {"dead_letter": {"topic": f"{topic}-dead"}}
            if kind == "sqlite":
                sections["storage"] = on_disk(folder, topic)
            rows.append(Row(name, topic, 1, RECORDS, sections, cores=PROCESS_CORES, poison=poison))
        says = f"{RECORDS:,} inserts of 1 KiB in one partition, beside another one; {PROCESS_CORES} of a core."
        part = Part(f"Beside poison, {kind}", says, rows, 0)
        await interleaved(bootstrap, folder, rows)
        share = RECORDS / statistics.median(rows[1].answered_beside)
        rows[1].reason = f"{share:.1f} operations for each poison record, which is answered and dead-lettered"
        lines += part.table()
    return lines


async def by_distance(_bootstrap: str, _folder: Path) -> list[str]:
    """Time a commit's offset map by its distance."""
    lines = [
        "## Distance of the offset map",
        "",
        "One record stuck, every second one above it finished, which no run shortens: what one commit takes, and what",
        f"that is for each record at {PARTITION_RATE:,}/s a partition and a commit every {COMMIT_SECONDS} s.",
        "",
        "| offsets above the stuck one | µs a commit | µs a record | characters of metadata |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for distance in (0, 100, 1_000, 10_000, DISTANCE_MAX - 1):
        tracker = OffsetTracker(0)
        tracker.track(range(distance + 1))
        tracker.resolve(range(2, distance + 1, 2))
        took = []
        text = ""
        for _ in range(20):
            began = time.perf_counter()
            text = encode(tracker.watermark, tracker.finished_runs(), "cluster")
            took.append((time.perf_counter() - began) * 1e6)
        cost = statistics.median(took)
        each = cost / (PARTITION_RATE * COMMIT_SECONDS)
        lines.append(f"| {distance:,} | {cost:,.0f} | {each:.3f} | {len(text):,} |")
    return [*lines, ""]


@dataclass(frozen=True)
class HalfLoad:
    """What one run at half load came to."""

    median: float
    """Milliseconds from a record to its response."""
    high: float
    """The 99th percentile of the same."""
    late: float
    """Milliseconds that the producer was behind, at its worst."""
    others: float
    """Cores that processes took that have no part in it."""


async def half_load(
    bootstrap: str, folder: Path, name: str, rate: float, answer: Callable[[str, str], Sequence[str]]
) -> HalfLoad:
    """Produce *rate* records a second for what answers them; *answer* makes the command of it, given both topics."""
    output = f"{name}-responses"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        stamped = {"message.timestamp.type": "LogAppendTime"}
        await admin.create_topics([NewTopic(topic, PARTITIONS, 1, topic_configs=stamped) for topic in (name, output)])
    finally:
        await admin.close()
    ends = [TopicPartition(output, partition) for partition in range(PARTITIONS)]
    with (folder / f"{name}.log").open("wb") as log:
        answering = await asyncio.create_subprocess_exec(*answer(name, output), stderr=log)
    reader = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", max_poll_records=5_000)
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, linger_ms=0)
    await reader.start()
    await producer.start()
    reader.assign(ends)
    sent: dict[tuple[int, int], int] = {}
    try:
        for first_rate, seconds in ((100.0, 1.0), (rate, WARM_SECONDS)):
            await produce(producer, name, first_rate, seconds, sent)
            await answered(reader, sent)  # it reads by now: no load waits for its start
            sent.clear()
        began, busy, ours = time.perf_counter(), busy_seconds(), bench._cpu_seconds(os.getpid())
        late = await produce(producer, name, rate, HALF_LOAD_SECONDS, sent)
        others = busy_seconds() - busy - (bench._cpu_seconds(os.getpid()) - ours)
        others /= time.perf_counter() - began
        took = sorted(await answered(reader, sent))
    finally:
        answering.terminate()
        await answering.wait()
        await producer.stop()
        await reader.stop()
    middle, high = (took[int(len(took) * share)] for share in (0.5, 0.99))
    say(f"{name:>20}: {rate:,.0f}/s, p50 {middle} ms, p99 {high} ms; late {late * 1000:.0f} ms, others {others:.2f}")
    return HalfLoad(middle, high, late * 1000, max(0.0, others))


def busy_seconds() -> float:
    """Return for how long the cores have worked, all of them together, for anybody."""
    user, nice, system, _, _, interrupt, soft_interrupt, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupt + soft_interrupt) / os.sysconf("SC_CLK_TCK")


async def answered(reader: AIOKafkaConsumer, sent: dict[tuple[int, int], int]) -> list[int]:
    """Wait for a response to each record; return how long each took.

    Raises:
        TimeoutError: one is missing for a minute.
    """
    took: list[int] = []
    async with asyncio.timeout(60):
        while len(took) < len(sent):
            for records in (await reader.getmany(timeout_ms=500)).values():
                for record in records:
                    place = dict(record.headers)["tierstream-response-id"].decode().split("/")
                    took.append(record.timestamp - sent[int(place[1]), int(place[2])])
    return took


async def produce(
    producer: AIOKafkaProducer, topic: str, rate: float, seconds: float, sent: dict[tuple[int, int], int]
) -> float:
    """Send inserts evenly for *seconds*; note when each was sent, by partition and offset.

    Without garbage collection: with the futures of so many records it stops everything for a tenth of a second.

    Returns:
        The longest time that a record was sent too late, in seconds.
    """
    payload, context = os.urandom(1024), ObjectContext("bench")
    keys = [f"object-{number}" for number in range(OBJECTS)]
    values = [encode_operation(Insert(context, key, DEFAULT_METADATA, payload), None) for key in keys]
    waiting: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        began, number, late = time.perf_counter(), 0, 0.0
        while (passed := time.perf_counter() - began) < seconds:
            late = max(late, passed - number / rate)
            while number < passed * rate:
                value, partition = values[number % OBJECTS], number % PARTITIONS
                now = time.time_ns() // 1_000_000
                waiting.append(await producer.send(topic, value, partition=partition, timestamp_ms=now))
                number += 1
            await asyncio.sleep(TICK_SECONDS)
        for written in waiting:
            told = await written
            sent[told.partition, told.offset] = told.timestamp
    finally:
        gc.enable()
    return late


async def latencies(bootstrap: str, folder: Path) -> list[str]:
    """Find how fast the service is at three latencies, then look at the responses at half of that."""
    topic = await filled(bootstrap, "latencies", PARTITIONS, RECORDS, 1024)
    table, late, others, pace = [], 0.0, 0.0, PACE_SECONDS * 1000
    for wait in (0, 5, 20):
        row = Row(f"{wait} ms", topic, PARTITIONS, RECORDS, {"storage": latency(wait)})
        await interleaved(bootstrap, folder, [row])
        rate = row.median("records_per_second") / 2

        def echo(source: str, output: str, wait: int = wait) -> Sequence[str]:
            return [sys.executable, str(ECHO_LOOP), bootstrap, source, output, str(wait)]

        def service(source: str, output: str, wait: int = wait) -> Sequence[str]:
            config = configured(bootstrap, folder, Row("", source, PARTITIONS, 0, {"storage": latency(wait)}), output)
            return [sys.executable, "-m", "consumer", "run", "--config", str(config)]

        made: dict[str, list[HalfLoad]] = {"echo": [], "service": []}
        for number in range(ROUNDS):
            for side, answer in (("echo", echo), ("service", service)):
                made[side].append(await half_load(bootstrap, folder, f"{side}-{wait}-{number}", rate, answer))
        late = max(late, *[one.late for side in made.values() for one in side])
        others = max(others, *[one.others for side in made.values() for one in side])
        bound = 2 * (wait + pace)
        floor, ours = (
            [statistics.median(getattr(one, name) for one in made[side]) for name in ("median", "high")]
            for side in ("echo", "service")
        )
        table.append(
            f"| {wait} ms | {rate:,.0f} | {floor[0]:.0f} | {floor[1]:.0f} | {ours[0]:.0f} | {ours[1]:.0f} |"
            f" {bound:.0f} | {ours[1] / bound:.2f} |"
        )
    return [
        "## Latency at half load",
        "",
        "From a record in the broker's log to its response there, milliseconds, at half of the rate reached before.",
        f"Bound: twice the operation and the pace of small batches ({pace:.0f} ms) together. *Echo* is a bare loop of",
        "the client that decodes nothing, gathers nothing and answers with 100 bytes: what broker, client and machine",
        "take by themselves. The broker's clock ticks in milliseconds.",
        "",
        "| operation | records/s | echo p50 | echo p99 | p50 | p99 | bound | p99 over bound |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *table,
        "",
        f"Broker, producer and service share {os.cpu_count()} cores. At the worst the producer was {late:.0f} ms late,",
        f"and processes that have no part in this took {others:.2f} cores: the last hundredth pays for either.",
        *([] if os.sched_getscheduler(0) == os.SCHED_OTHER else [GOES_FIRST]),
        "",
    ]


async def compared(bootstrap: str, folder: Path, make: Callable[[str, Path], Awaitable[Part]]) -> list[str]:
    """Make a part, run its rows, return its table."""
    part = await make(bootstrap, folder)
    await interleaved(bootstrap, folder, part.rows)
    return part.table()


PARTS: dict[str, Callable[[str, Path], Awaitable[list[str]]]] = {
    "partitions": partial(compared, make=by_partitions),
    "window": partial(compared, make=by_window),
    "payload": partial(compared, make=by_payload),
    "distance": by_distance,
    "poison": beside_poison,
    "processes": partial(compared, make=by_processes),
    "cores": partial(compared, make=partial(by_processes, cores=PROCESS_CORES)),
    "latency": latencies,
}


def sections(text: str) -> dict[str, str]:
    """Take a document apart by its second headings."""
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in text.split("\n## ")[1:]}


async def measure(parts: Sequence[str], bootstrap: str, folder: Path) -> dict[str, str]:
    """Measure *parts*; return their sections, each with the load of the machine meanwhile."""
    made: dict[str, str] = {}
    for name in parts:
        say(f"==> {name}")
        lines = await PARTS[name](bootstrap, folder)
        told = f"Runs of each row: {ROUNDS}. The machine's load at the end of this: {os.getloadavg()[0]:.1f}."
        made |= sections("\n".join(["", *lines, told]))
    return made


def main(parts: Sequence[str]) -> int:
    """Measure *parts*, all by default, and put their sections in the place of those the document had."""
    with tempfile.TemporaryDirectory() as folder, maven_broker(Path(folder), java_settings=BROKER) as broker:
        made = asyncio.run(measure(parts or list(PARTS), broker.bootstrap, Path(folder)))
    before = sections(DOCUMENT.read_text(encoding="utf-8")) if DOCUMENT.exists() else {}
    lines = [
        "# How it grows",
        "",
        "Written by `make bench-growth`; what is measured, and how, is in `tests/growth_bench.py`.",
        "",
        "* Medians of interleaved runs; ratios are to the part's base row, in the same run. Rates suffer",
        "  from whatever else the machine does, CPU a record less so: the load stands under each part; 3 of it is the",
        "  measurement's own.",
        f"* Apache Kafka {kafka_version()}, Python {platform.python_version()}; {os.cpu_count()} cores for all of it.",
        "",
        "\n".join((before | made).values()),
    ]
    DOCUMENT.write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
