"""What storage takes, through the service's executor, beside a bare loop over the same client: ``make bench-storage``.

1. For each kind of storage, in turns and ``BENCH_ROUNDS`` times (3): first the *bare* loop, the least that does the
   same work with the same client, then the service's own: ``StorageService.stream``, served as a partition is, ordering
   by key, positions, tiers.
2. Each writes ``BENCH_OPERATIONS`` objects of 1 KiB (GCS: a fiftieth of them, of 16 KiB) and reads them back.
   * *sqlite*, on the disk of ``BENCH_FOLDER`` (the temporary folder): bare = one thread, no event loop, a transaction
     of 400 rows with ``synchronous = FULL``, a query per row; ours = 8 streams with a window of 50 each.
   * *bigtable*, on Google's emulator: bare = conditional writes made beforehand, and ``ReadRows`` of one row, 50 at a
     time over one connection; ours = one stream with a window of 50, and the same *one by one*. The emulator answers on
     loopback within the time that the client takes to ask, so both again *far*: each request waits :data:`FAR_SECONDS`
     before it is sent, as the network and the service would have it wait.
   * *gcs*, on fake-gcs-server: bare = the vendor's client in 50 threads; ours = one stream with a window of 50.
3. Rates are medians. CPU is what this process was charged per operation; a server's is not in it.

Rates of different runs and machines cannot be compared; the ratio within one run can.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage as gcs_vendor
from google.cloud.bigtable_v2 import types

from bigtable_emulator import emulator_command, running_emulator
from consumer.ids import ObjectContext, Scope
from consumer.operations import Get, Insert, Metadata, Operation, Position
from consumer.permits import ConcurrencyLimiter
from consumer.retry import RetryPolicy
from consumer.service import StorageService
from consumer.storage import sqlite
from consumer.storage.bigtable import BigtableBackend
from consumer.storage.gcs import GcsBackend
from consumer.storage.memory import MemoryBackend
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.tiered import TieredStorage
from gcs_servers import fake_gcs_binary, running_fake_gcs

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
OPERATIONS = int(os.environ.get("BENCH_OPERATIONS", "40000"))
WINDOW, STREAMS = 50, 8
PAYLOAD, LARGE = b"x" * 1024, b"x" * 16_384
CONTEXT = ObjectContext("bench", [Scope("org", "1")])
METADATA = b'{"content_type":"application/octet-stream","time_created":"2026-01-01T00:00:00.000000Z","size":1024}'
SECONDS = 60.0

FAR_SECONDS = 0.005
"""What a request to Bigtable takes within a region: single-digit milliseconds, as Google has it."""

Rates = dict[str, list[tuple[float, float]]]
"""By what was done: operations a second, and microseconds of CPU for each."""


def timed(rates: Rates, name: str, count: int, began: tuple[float, float]) -> None:
    """Note what *count* operations took that *began* then."""
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    rates[name].append((count / wall, cpu / count * 1_000_000))


def now() -> tuple[float, float]:
    """Return the two clocks."""
    return time.perf_counter(), time.process_time()


def path(number: int) -> str:
    """Return the storage path of an object."""
    return f"{CONTEXT.storage_prefix}{number}"


async def at_once(count: int, limit: int, one: Callable[[int], Awaitable[object]]) -> None:
    """Do *one* for each number, *limit* at a time."""
    numbers = iter(range(count))

    async def some() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(some() for _ in range(limit)))


async def served(
    rates: Rates,
    tiers: TieredStorage,
    count: int,
    streams: int,
    payload: bytes,
    label: str = "",
    *,
    window: int = WINDOW,
) -> None:
    """Write and read through the service, *streams* of them with a *window* each."""
    service = StorageService(tiers, ConcurrencyLimiter(500), retry=RetryPolicy(attempt_timeout_seconds=SECONDS))
    made = len(rates["insert, service" + label])

    def insert(number: int) -> Operation:
        # A source of its own for each kind of run: an older position of the same one would be refused.
        position = Position(f"cluster{label}/topic/{number % streams}", made * count + number)
        return Insert(CONTEXT, str(number), Metadata(), payload, position)

    async def run(stream: int, make: Callable[[int], Operation]) -> None:
        records = ((number, make(number)) for number in range(stream, count, streams))
        async with service.stream(window=window, ordering="key") as executor:
            await executor.serve(partial(next, records, None), _over, _take)

    for name, make in (("insert", insert), ("get", lambda number: Get(CONTEXT, str(number)))):
        began = now()
        await asyncio.gather(*(run(stream, make) for stream in range(streams)))
        timed(rates, f"{name}, service{label}", count, began)
    await tiers.join()


async def _over() -> bool:
    """Say that there is no more, where all has been at hand."""
    return False


def _take(_index: int, outcome: object) -> None:
    """Take an outcome, which is to be a success."""
    if isinstance(outcome, Exception):
        raise outcome


def bare_sqlite(rates: Rates, file: Path) -> None:
    """Write and read with nothing but the database, in one thread."""
    with sqlite3.connect(file, isolation_level=None) as connection:
        sqlite._create_or_check(connection)
        connection.execute("PRAGMA synchronous = FULL")
        write = "INSERT OR REPLACE INTO objects (path, metadata, source, position, payload) VALUES (?, ?, ?, ?, ?)"
        began = now()
        for first in range(0, OPERATIONS, WINDOW * STREAMS):
            connection.execute("BEGIN IMMEDIATE")
            for number in range(first, min(OPERATIONS, first + WINDOW * STREAMS)):
                connection.execute(write, (path(number), METADATA, "cluster/topic/0", number, PAYLOAD))
            connection.execute("COMMIT")
        timed(rates, "insert, bare", OPERATIONS, began)
        began = now()
        for number in range(OPERATIONS):
            connection.execute("SELECT metadata, payload FROM objects WHERE path = ?", (path(number),)).fetchone()
        timed(rates, "get, bare", OPERATIONS, began)
    connection.close()


async def bare_bigtable(rates: Rates, host: str, backend: BigtableBackend, count: int) -> None:
    """Send requests that were made before, over one connection."""
    table = backend._table._path
    cells = ((b"m", METADATA), (b"p", PAYLOAD), (b"w", b"0" * 32))
    kinds = types.Mutation.pb()
    written = [
        kinds(set_cell=kinds.SetCell(family_name="fm", column_qualifier=column, timestamp_micros=0, value=value))
        for column, value in cells
    ]
    target = types.RowFilter.pb()(column_qualifier_regex_filter=b"r")
    check, read = types.CheckAndMutateRowRequest.pb(), types.ReadRowsRequest.pb()
    writes = [
        check(
            table_name=table,
            row_key=path(number).encode(),
            predicate_filter=target,
            false_mutations=[*backend._removal, *written],
        ).SerializeToString()
        for number in range(count)
    ]
    reads = [
        read(table_name=table, rows={"row_keys": [path(number).encode()]}).SerializeToString()
        for number in range(count)
    ]
    service = "/google.bigtable.v2.Bigtable/"
    async with grpc.aio.insecure_channel(host) as channel:
        writing: Any = channel.unary_unary(service + "CheckAndMutateRow")
        reading: Any = channel.unary_stream(service + "ReadRows")

        async def write(number: int) -> None:
            await writing(writes[number], timeout=SECONDS)

        async def read_one(number: int) -> None:
            async for _ in reading(reads[number], timeout=SECONDS):
                pass

        for name, one in (("insert", write), ("get", read_one)):
            began = now()
            await at_once(count, WINDOW, one)
            timed(rates, f"{name}, bare", count, began)


class _Far:
    """What requests go through, when the other end is not on this machine."""

    seconds = 0.0

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._connection, name)
        if not self.seconds or name == "close":
            return method

        async def request(*given: Any, **named: Any) -> Any:
            await asyncio.sleep(self.seconds)
            return await method(*given, **named)

        return request


def bare_gcs(rates: Rates, endpoint: str, bucket: str, count: int) -> None:
    """Upload and download with the vendor's client, in threads."""
    client = gcs_vendor.Client(
        project="bench", credentials=AnonymousCredentials(), client_options={"api_endpoint": endpoint}
    )
    objects = [client.bucket(bucket).blob(f"bare/{number}/{time.time_ns()}") for number in range(count)]

    def upload(blob: Any) -> None:
        blob.upload_from_string(LARGE, if_generation_match=0, timeout=SECONDS)

    with ThreadPoolExecutor(WINDOW) as threads:
        for name, one in (("insert", upload), ("get", lambda blob: blob.download_as_bytes(timeout=SECONDS))):
            began = now()
            list(threads.map(one, objects))
            timed(rates, f"{name}, bare", count, began)
    client.close()


def rounds() -> Iterator[int]:
    """Begin each round with what is left of the others collected."""
    for number in range(ROUNDS):
        gc.collect()
        yield number


async def measure_sqlite(rates: Rates, folder: Path) -> None:
    """Both sides, on files of their own."""
    backend = SqliteBackend(folder / "ours" / "objects.sqlite")
    tiers = TieredStorage(backend, MemoryBackend())
    for number in rounds():
        bare_sqlite(rates, folder / f"bare-{number}.sqlite")
        await served(rates, tiers, OPERATIONS, STREAMS, PAYLOAD)
    await tiers.close()


async def measure_bigtable(rates: Rates, folder: Path) -> None:
    """Both sides on one table, and ours one by one."""
    with running_emulator(folder) as emulator:
        backend = emulator.backend(await emulator.create(emulator.unused_table()))
        backend._table._connection = cast("Any", _Far(await backend._table._connect()))
        tiers = TieredStorage(backend, MemoryBackend())
        count = OPERATIONS // 4
        for _ in rounds():
            await bare_bigtable(rates, emulator.host, backend, count)
            for seconds, label in ((0.0, ""), (FAR_SECONDS, ", far")):
                _Far.seconds = seconds
                await served(rates, tiers, count, 1, PAYLOAD, label)
                await served(rates, tiers, count // 20, 1, PAYLOAD, f"{label}, one by one", window=1)
        await tiers.close()


async def measure_gcs(rates: Rates, folder: Path) -> None:
    """Both sides in one bucket; rows in memory."""
    binary = fake_gcs_binary()
    assert binary is not None, "there is no fake-gcs-server for this machine"
    with running_fake_gcs(binary, folder) as new_bucket:
        endpoint, bucket = new_bucket()
        count = OPERATIONS // 50
        backend = GcsBackend(bucket, endpoint=endpoint, prefix="tier/")
        tiers = TieredStorage(MemoryBackend(), backend, threshold=len(PAYLOAD))
        for _ in rounds():
            await asyncio.to_thread(bare_gcs, rates, endpoint, bucket, count)
            await served(rates, tiers, count, 1, LARGE)
        await tiers.close()


KINDS = {"sqlite": measure_sqlite, "bigtable": measure_bigtable, "gcs": measure_gcs}


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201 - a program, whose output this is


def main(kinds: list[str]) -> int:
    """Measure *kinds*, all by default, and print a table."""
    for kind in kinds or KINDS:
        if kind == "bigtable" and not emulator_command():
            say("bigtable: there is no emulator on this machine")
            continue
        rates: Rates = defaultdict(list)
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as folder:
            asyncio.run(KINDS[kind](rates, Path(folder)))
        for name, found in sorted(rates.items()):
            rate, cpu = (statistics.median(numbers) for numbers in zip(*found, strict=True))
            bare = statistics.median(rate for rate, _ in rates[name.partition(",")[0] + ", bare"])
            spread = "-".join(f"{edge(rate for rate, _ in found):.0f}" for edge in (min, max))
            say(f"{kind:9} {name:28} {rate:8.0f}/s ({spread}) {rate / bare:5.2f} x bare {cpu:6.1f} us CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
