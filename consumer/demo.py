"""The demo: real files through the whole service on a real broker, and every response checked.

1. A temporary folder, the embedded broker, and ``tierstream run`` as a process of its own with sqlite and filesystem
   tiers: everything a deployment has, but for the machines.
2. *Inserts*: every file of a folder (by default the Python standard library's source), and a few larger than 1 MiB made
   from them, so that both tiers are used. Files above 512 KiB go in by reference; the service reads them itself.
3. *Heads* of every third, *gets* of every fourth that fits a record, *deletes* of every fifth, then a head and a get
   of some that were deleted. Records that cannot be decoded are strewn in between.
4. Everything is sent without waiting: operations on one object keep their order, because they share a partition.
5. *The ledger* knows for each record what its response has to say, and where that stands: index = offset. Responses are
   read back from the broker and compared: missing, repeated, wrong status, wrong bytes.
6. *The report*, checked by itself: exit code 0 only if nothing is missing, repeated or wrong and the service left
   cleanly.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c
import orjson
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from consumer.broker import DevBroker
from consumer.codec import decode_response, encode_operation
from consumer.config import Config, load
from consumer.errors import InvalidOperation, TierstreamError
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.kafka.clients import make_producer
from consumer.kafka.publisher import Lane, Publisher
from consumer.kafka.tools import tail
from consumer.kafka.topics import Cluster, ensure_topics
from consumer.lifeline import dies_with
from consumer.operations import Delete, Get, Head, Insert, Metadata, Operation, PayloadReference

TOPIC = "operations"
PARTITIONS = 6
REFERENCE_BYTES = 512 * 1024
"""Files above this go in by reference: the embedded broker takes records up to 1 MiB."""
GET_BYTES_MAX = 900 * 1024
"""Larger objects do not fit a response on the embedded broker."""
FILES_MIN = 2_000
"""A smaller source is streamed again under other names: some systems ship only a part of the standard library."""
FILES_MAX = 20_000
"""Files that are streamed at most; the demo is to end soon."""
FILE_BYTES_MAX = 64 * 1024 * 1024
"""Larger files are left out, for the same reason, and because the temporary folder would hold them all."""
LARGE_FILES = 6
LARGE_BYTES = 1_500_000
"""Made from the source's own files, so that they are above the 1 MiB that live in the high-volume tier."""
CHUNK_BYTES = 1 << 20
RECORD_BYTES_MAX = 1_000_000
"""What the embedded broker takes."""
IN_FLIGHT_RECORDS = 2_000
"""Sent and not answered: what bounds the memory of the demo itself."""
STALL_SECONDS = 60.0
"""No response for so long ends the reading; what has not come is missing."""
LOG_TAIL_CHARACTERS = 2_000
"""How much of the service's log is shown when it ends or stands still."""
DUPLICATE_SECONDS = 1.0
"""How long responses are read on when all have come."""
START_SECONDS = 60.0
STOP_SECONDS = 60.0
SAMPLE_SECONDS = 0.2
PROBLEMS_SHOWN = 20
"""Records of each kind that the report names as text; as JSON it names all."""

UNDECODABLE: Sequence[tuple[str, bytes | None, str]] = (
    ("no value at all", None, "null_value"),
    ("an empty value", b"", "decode_error"),
    ("half a Confluent frame", b"\x00\x00", "decode_error"),
    ("a schema nobody knows", b"\x00\x00\x00\x00\x2a\x02\x02", "unknown_schema"),
    ("text instead of Avro", b"\x0a{not avro}", "decode_error"),
    ("a cut record", b"\x08demo\x00\x00", "decode_error"),
)

CONTEXT = ObjectContext("demo", [Scope("source", "files")])


def _id(partition: int, offset: int) -> str:
    """Return the id that a response to this record carries (contract 2.3)."""
    return f"{TOPIC}/{partition}/{offset}"


class DemoFailure(TierstreamError):
    """The service did not start, or the files cannot be read."""


@dataclass(slots=True)
class Expected:
    """What the response to one record has to be."""

    kind: str
    status: int
    key: str | None = None
    code: str | None = None
    size: int | None = None
    crc32c: int | None = None
    """Of the payload that a get has to bring back."""
    answers: int = 0


@dataclass
class Ledger:
    """Every record sent, by its position; told nothing by the service but its responses."""

    expected: dict[tuple[int, int], Expected] = field(default_factory=dict)
    answered: int = 0
    duplicated: list[str] = field(default_factory=list)
    """Ids of records, once for each response too many."""
    unexpected: list[str] = field(default_factory=list)
    """Ids in responses to records that were never sent."""
    wrong: dict[str, str] = field(default_factory=dict)
    """What is wrong with the response, by the record's id."""
    by_kind: Counter[str] = field(default_factory=Counter)
    by_code: Counter[str] = field(default_factory=Counter)

    def sent(self, partition: int, offset: int, expected: Expected) -> None:
        """Enter one record."""
        self.expected[partition, offset] = expected

    @property
    def waiting(self) -> int:
        """How many records have no response yet."""
        return len(self.expected) - self.answered

    @property
    def missing(self) -> list[str]:
        """Ids of the records without a response yet."""
        return [_id(*position) for position, expected in self.expected.items() if not expected.answers]

    @property
    def is_right(self) -> bool:
        """True where every record has its response, once, and as expected."""
        return not (self.waiting or self.duplicated or self.unexpected or self.wrong)

    def check(self, response: Any) -> None:
        """Compare one response, as decoded, with what was expected of it."""
        source = response["source"]
        position = source["partition"], source["offset"]
        expected = self.expected.get(position)
        if expected is None:
            self.unexpected.append(_id(*position))
            return
        expected.answers += 1
        if expected.answers > 1:
            self.duplicated.append(_id(*position))
            return
        self.answered += 1
        self.by_kind[expected.kind] += 1
        problem = self._problem(response, expected, position[1])
        if problem:
            self.wrong[_id(*position)] = f"{expected.kind}: {problem}"

    def _problem(self, response: Any, expected: Expected, offset: int) -> str | None:
        result = response["result"]
        name = result["type"]
        if name == "Failure":
            self.by_code[result["code"]] += 1
            if result["code"] != expected.code:
                return f"failed with {result['code']}: {result['message']}"
        elif expected.code is not None:
            return f"answered as {name} instead of {expected.code}"
        if response["index"] != offset:
            return f"index {response['index']}"
        if response["status"] != expected.status:
            return f"status {response['status']} instead of {expected.status}"
        if response["key"] != expected.key:
            return "another key"
        if name == "Headed" and expected.size is not None and result["metadata"]["size"] != expected.size:
            return f"size {result['metadata']['size']} instead of {expected.size}"
        if name == "Got" and expected.crc32c is not None:
            payload = result["object"]["payload"]
            if google_crc32c.value(payload) != expected.crc32c:
                return "other bytes than were stored"
        return None


def main(
    *,
    source: Path | None = None,
    records: int | None = None,
    wait: bool = True,
    keep: bool = False,
    as_json: bool = False,
) -> int:
    """Run the demo, print progress on stderr and the report on stdout; return the exit code.

    Args:
        source: Folder of files to stream; None is the Python standard library.
        records: Stop after so many records; None streams everything.
        wait: Keep service and status page up until Ctrl-C after the report.
        keep: Keep the temporary folder.
        as_json: Print the report as JSON.
    """
    folder = Path(tempfile.mkdtemp(prefix="tierstream-demo-"))
    try:
        return asyncio.run(_Demo(folder, source, records).run(wait=wait, as_json=as_json))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    finally:
        if keep:
            print(f"kept: {folder}", file=sys.stderr)  # noqa: T201 - the command's output
        else:
            _remove(folder)


def _remove(folder: Path) -> None:
    import shutil  # noqa: PLC0415 - only here

    shutil.rmtree(folder, ignore_errors=True)


class _Demo:
    def __init__(self, folder: Path, source: Path | None, records_max: int | None) -> None:
        self._folder = folder
        self._source = (source or Path(sysconfig.get_paths()["stdlib"])).resolve()
        self._large = folder / "large"
        self._records_max = records_max
        self._ledger = Ledger()
        self._console = Console(stderr=True)
        self._windows: dict[str, dict[str, int]] = {}
        self._lanes: list[Lane] = []
        self._offsets = [0] * PARTITIONS
        self._room = asyncio.Event()
        self._all_sent = False
        self._answered_at = 0.0
        self._left_out = 0

    async def run(self, *, wait: bool, as_json: bool) -> int:
        """Do everything; return the exit code. SIGTERM cancels it, as Ctrl-C does."""
        this = asyncio.current_task()
        assert this is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
        async with AsyncExitStack() as stack:
            self._say("starting the embedded broker")
            broker = DevBroker(self._folder / "broker")
            await asyncio.to_thread(broker.start)
            stack.push_async_callback(asyncio.to_thread, broker.stop)
            config_path = self._configure(broker.bootstrap)
            config = load(config_path, {})
            async with Cluster(config) as cluster:
                await ensure_topics(cluster, config)
            self._say("starting the service")
            service = await self._start_service(config_path)
            stack.push_async_callback(self._kill, service)
            address = await self._address(service)
            self._say(f"status page: {address}/")
            publisher = Publisher(
                partial(make_producer, config), attempt_timeout_seconds=30, on_failure=self._publisher_failed
            )
            await publisher.start()
            stack.push_async_callback(publisher.stop, 2)
            self._lanes = [publisher.lane(TOPIC, partition) for partition in range(PARTITIONS)]
            seconds = await self._stream(config, address, service)
            report = await self._report(address, seconds)
            if as_json:
                print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())  # noqa: T201 - the command's output
            else:
                _print(report)
            if wait:
                self._say(f"the status page stays up: {address}/  (Ctrl-C ends it)")
                with suppress(asyncio.CancelledError):
                    await service.wait()
            clean = await self._stop_service(service)
            if not clean:
                self._say("the service did not end cleanly")
            return 0 if clean and report["ok"] else 1

    def _say(self, text: str) -> None:
        self._console.print(f"==> {text}", highlight=False)

    def _publisher_failed(self, error: BaseException) -> None:
        self._say(f"the demo's own producer failed: {error!r}")

    # ------------------------------------------------------------------------------------------ the service

    def _configure(self, bootstrap: str) -> Path:
        path = self._folder / "tierstream.yaml"
        settings = {
            "kafka": {
                "bootstrap_servers": [bootstrap],
                "session_timeout": "6s",
                "heartbeat_interval": "1s",
                "request_timeout": "30s",
                "transaction_timeout": "20s",
            },
            "rebalance": {"timeout": "20s", "drain_timeout": "10s"},
            "topics": {"partitions": PARTITIONS, "replication_factor": 1},
            "output": {"max_request_bytes": RECORD_BYTES_MAX},
            "limits": {"record_bytes": RECORD_BYTES_MAX, "response_bytes": RECORD_BYTES_MAX - 64 * 1024},
            "references": {"allowed_prefixes": [f"{self._source.as_uri()}/", f"{self._large.as_uri()}/"]},
            "storage": {
                "high_volume": {"type": "sqlite", "path": str(self._folder / "objects.sqlite")},
                "long_term": {"type": "filesystem", "path": str(self._folder / "objects")},
                "change_log": {"type": "sqlite", "path": str(self._folder / "objects.sqlite")},
            },
            "admin": {"port": 0},
            "log": {"format": "json"},
        }
        path.write_text(yaml.safe_dump(settings))
        return path

    async def _start_service(self, config_path: Path) -> asyncio.subprocess.Process:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TIERSTREAM_")}
        with (self._folder / "service.log").open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "consumer", "run", "--config", str(config_path)),
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the demo, which then asks the service to leave, once
                preexec_fn=dies_with(os.getpid()),
            )

    async def _address(self, service: asyncio.subprocess.Process) -> str:
        """Wait until the service is ready; return the address of its admin port."""
        address = None
        async with asyncio.timeout(START_SECONDS):
            while True:
                if service.returncode is not None:
                    raise DemoFailure(f"the service ended at start: {self._log_tail()}")
                for line in (self._folder / "service.log").read_text().splitlines():
                    entry = orjson.loads(line)
                    if entry.get("event") == "started":
                        address = f"http://127.0.0.1:{entry['admin_port']}"
                if address is not None:
                    answer = await asyncio.to_thread(_fetch, f"{address}/readyz")
                    if answer is not None and orjson.loads(answer)["ready"]:
                        return address
                await asyncio.sleep(SAMPLE_SECONDS)

    def _log_tail(self) -> str:
        return (self._folder / "service.log").read_text()[-LOG_TAIL_CHARACTERS:]

    async def _stop_service(self, service: asyncio.subprocess.Process) -> bool:
        """Ask the service to leave; True where it did so cleanly."""
        if service.returncode is None:
            service.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                return await service.wait() == 0
        except TimeoutError:
            return False

    @staticmethod
    async def _kill(service: asyncio.subprocess.Process) -> None:
        if service.returncode is None:
            service.kill()
            await service.wait()

    # ------------------------------------------------------------------------------------------ records and responses

    async def _stream(self, config: Config, address: str, service: asyncio.subprocess.Process) -> float:
        """Send everything and read every response, both at once; return the seconds from first to last.

        Raises:
            DemoFailure: a file cannot be read any more.
        """
        self._say(f"counting the files below {self._source}")
        total = sum(1 for _ in self._records())
        if self._left_out:
            self._say(f"left out: {self._left_out} files, for their size or because their path is no object key")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=False) as progress:
            answers = progress.add_task("responses", total=total)
            began = self._answered_at = time.perf_counter()
            watching = asyncio.create_task(self._watch_windows(address))
            sending = asyncio.create_task(self._send_all())
            reading = asyncio.create_task(self._read_all(config, partial(progress.update, answers)))
            ended = asyncio.create_task(service.wait())
            tasks = {watching, sending, reading, ended}
            try:
                await asyncio.wait((sending, reading, ended), return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()  # raises what kept it from sending everything
                await asyncio.wait((reading, ended), return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    reading.result()
                else:
                    self._say(f"the service ended; its log: {self._log_tail()}")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        return self._answered_at - began

    async def _send_all(self) -> None:
        for record_key, value, expected in self._records():
            while self._ledger.waiting >= IN_FLIGHT_RECORDS:
                self._room.clear()
                await self._room.wait()
            partition = zlib.crc32(record_key) % PARTITIONS
            self._ledger.sent(partition, self._offsets[partition], expected)
            self._offsets[partition] += 1
            self._lanes[partition].append(record_key, value, [], self, 0)
            await asyncio.sleep(0)
        self._all_sent = True

    def acknowledged(self, tokens: Sequence[int]) -> None:
        """Records are on the broker; the ledger needs no more than their responses."""

    def refused(self, _token: int) -> None:
        """The broker takes no record of this size; its response will be missing."""
        self._say("the broker refused a record for its size")

    async def _read_all(self, config: Config, show: Callable[..., object]) -> None:
        """Read until every record is answered, and a little longer: what comes then is a duplicate.

        Returns early where no response comes for :data:`STALL_SECONDS`.
        """
        async with aclosing(tail(config, config.output.topic, follow=True, from_beginning=True)) as records:
            while True:
                complete = self._all_sent and not self._ledger.waiting
                try:
                    async with asyncio.timeout(DUPLICATE_SECONDS if complete else STALL_SECONDS):
                        record = await anext(records)
                except TimeoutError:
                    if not complete:
                        self._say(f"no response for {STALL_SECONDS:.0f} s; the service's log: {self._log_tail()}")
                    return
                assert record.value is not None
                self._ledger.check(decode_response(record.value))
                self._answered_at = time.perf_counter()
                self._room.set()
                show(completed=self._ledger.answered)

    def _records(self) -> Iterator[tuple[bytes, bytes | None, Expected]]:
        """Yield record key, value and expectation of everything that is sent, the same every time.

        Raises:
            DemoFailure: a file cannot be read.
        """
        try:
            yield from islice(self._all_records(), self._records_max)
        except OSError as error:
            raise DemoFailure(f"{error.filename} cannot be read: {error.strerror}") from error

    def _all_records(self) -> Iterator[tuple[bytes, bytes | None, Expected]]:
        files = self._files()
        every = max(1, len(files) // len(UNDECODABLE))
        for number, (key, path) in enumerate(files):
            yield self._insert(key, path)
            if number % every == 0 and number // every < len(UNDECODABLE):
                _, value, code = UNDECODABLE[number // every]
                yield b"undecodable", value, Expected("unknown", 400, code=code)
        for number, (key, path) in enumerate(files):
            size = path.stat().st_size
            if number % 3 == 0:
                yield self._operation(Head(CONTEXT, key), Expected("head", 204, key, size=size))
            if number % 4 == 0 and size <= GET_BYTES_MAX:
                crc = google_crc32c.value(path.read_bytes())
                yield self._operation(Get(CONTEXT, key), Expected("get", 200, key, size=size, crc32c=crc))
            if number % 5 == 0:
                yield self._operation(Delete(CONTEXT, key), Expected("delete", 204, key))
            if number % 10 == 0:
                yield self._operation(Head(CONTEXT, key), Expected("head", 404, key))
                yield self._operation(Get(CONTEXT, key), Expected("get", 404, key))

    def _files(self) -> list[tuple[str, Path]]:
        """Keys and paths of everything to be streamed; of a small folder several times, as other objects."""
        if not self._large.exists():
            self._make_large_files()
        found = self._source_files()
        large = [(f"large/{path.name}", path) for path in sorted(self._large.iterdir())]
        copies = max(1, -(-FILES_MIN // max(1, len(found))))
        return large + [(f"{copy}/{key}", path) for copy in range(copies) for key, path in found]

    def _source_files(self) -> list[tuple[str, Path]]:
        """Return the files of the source that can be streamed, with what is to be their key, in order."""
        found = [
            (path.relative_to(self._source).as_posix(), path)
            for path in self._source.rglob("*")
            if path.is_file()
            and not path.is_symlink()
            and not {"__pycache__", "site-packages", "dist-packages"} & set(path.relative_to(self._source).parts)
            and os.access(path, os.R_OK)
        ]
        fitting = [(key, path) for key, path in found if path.stat().st_size <= FILE_BYTES_MAX and _is_key(key)]
        self._left_out = len(found) - len(fitting)
        return sorted(fitting)[:FILES_MAX]

    def _make_large_files(self) -> None:
        """Fill files above 1 MiB with what the files of the source hold, over and over where that is little."""
        self._large.mkdir()
        text = bytearray()
        for _, path in self._source_files():
            text += path.read_bytes()
            if len(text) >= LARGE_BYTES:
                break
        content = bytes(text or b"-")
        for number in range(LARGE_FILES):
            size = LARGE_BYTES + LARGE_BYTES * (number + 1) // 2
            repeated = content * (size // len(content) + 2)
            (self._large / f"large-{number}.bin").write_bytes(repeated[number : number + size])

    def _insert(self, key: str, path: Path) -> tuple[bytes, bytes | None, Expected]:
        size = path.stat().st_size
        metadata = Metadata(filename=path.name, custom={"folder": path.parent.name} if path.parent.name else {})
        payload: bytes | PayloadReference
        if size > REFERENCE_BYTES:
            crc32c = 0
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    crc32c = google_crc32c.extend(crc32c, chunk)
            payload = PayloadReference(path.as_uri(), size, crc32c)
        else:
            payload = path.read_bytes()
        return self._operation(Insert(CONTEXT, key, metadata, payload), Expected("insert", 201, key))

    @staticmethod
    def _operation(operation: Operation, expected: Expected) -> tuple[bytes, bytes | None, Expected]:
        assert operation.key is not None
        path = ObjectId(operation.context, operation.key).storage_path
        return path.encode(), encode_operation(operation, f"demo-{expected.kind}"), expected

    # ------------------------------------------------------------------------------------------ the report

    async def _watch_windows(self, address: str) -> None:
        while True:
            answer = await asyncio.to_thread(_fetch, f"{address}/debug/state")
            if answer is not None:
                for state in orjson.loads(answer)["partitions"]:
                    if state["window"] is not None:
                        name = f"{state['topic']}/{state['partition']}"
                        seen = self._windows.setdefault(name, {"window": 0, "in_flight_max": 0})
                        seen["window"] = state["window"]
                        seen["in_flight_max"] = max(seen["in_flight_max"], state["in_flight"])
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _report(self, address: str, seconds: float) -> dict[str, Any]:
        ledger = self._ledger
        metrics = (await asyncio.to_thread(_fetch, f"{address}/metrics") or b"").decode()
        tiers = ("high_volume", "long_term")
        stored = {tier: _sample(metrics, f'tier="{tier}"', 'direction="write"') for tier in tiers}
        failures = dict(sorted(ledger.by_code.items()))
        return {
            "ok": ledger.answered > 0 and ledger.is_right,
            "records": len(ledger.expected),
            "responses": ledger.answered + len(ledger.duplicated) + len(ledger.unexpected),
            "missing": ledger.missing,
            "duplicated": ledger.duplicated,
            "unexpected": ledger.unexpected,
            "mismatched": list(ledger.wrong),
            "problems": ledger.wrong,
            "by_kind": dict(sorted(ledger.by_kind.items())),
            "failures": failures,
            "bytes_stored": stored,
            "windows": dict(sorted(self._windows.items())),
            "seconds": round(seconds, 2),
            "operations_per_second": round(ledger.answered / seconds, 1) if seconds > 0 else 0.0,
        }


def _is_key(text: str) -> bool:
    """Tell whether *text* can be the key of an object of the demo."""
    try:
        ObjectId(CONTEXT, f"{FILES_MIN}/{text}")
    except InvalidOperation:
        return False
    return True


def _fetch(address: str) -> bytes | None:
    """GET *address*; None where there is no answer."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:  # noqa: S310 - the service's own loopback address
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.read()
    except OSError:
        return None


def _sample(metrics: str, *labels: str) -> int:
    """Read one sample of ``tierstream_storage_bytes_total`` from the text of a scrape; 0 where there is none."""
    for line in metrics.splitlines():
        if line.startswith("tierstream_storage_bytes_total{") and all(label in line for label in labels):
            return int(float(line.rpartition(" ")[2]))
    return 0


def _print(report: dict[str, Any]) -> None:
    table = Table(title="tierstream demo", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows: list[tuple[str, object]] = [
        ("records in", f"{report['records']:,}"),
        ("responses out", f"{report['responses']:,}"),
        ("missing", len(report["missing"])),
        ("duplicated", len(report["duplicated"]) + len(report["unexpected"])),
        ("mismatched", len(report["mismatched"])),
        *((f"  {kind}", f"{number:,}") for kind, number in report["by_kind"].items()),
        *((f"  failed: {code}", f"{number:,}") for code, number in report["failures"].items()),
        *((f"bytes written, {tier} tier", f"{size:,}") for tier, size in report["bytes_stored"].items()),
        *(
            (f"window of {name}", f"{seen['window']} permits, at most {seen['in_flight_max']} seen in flight")
            for name, seen in report["windows"].items()
        ),
        ("seconds", report["seconds"]),
        ("operations per second", f"{report['operations_per_second']:,}"),
    ]
    for name, value in rows:
        table.add_row(name, str(value))
    console = Console()
    console.print(table)
    for name in ("missing", "duplicated", "unexpected"):
        for record in report[name][:PROBLEMS_SHOWN]:
            console.print(f"{name}: {record}", highlight=False, markup=False)
    for record, problem in list(report["problems"].items())[:PROBLEMS_SHOWN]:
        console.print(f"mismatched: {record}, {problem}", highlight=False, markup=False)
    verdict = "every response is there, once, and right" if report["ok"] else "NOT everything is right"
    console.print(verdict, style="bold")
