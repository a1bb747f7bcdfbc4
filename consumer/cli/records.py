"""``produce``, ``tail``, ``lag``: putting operations in, seeing responses come out, and how far behind the group is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final

import typer

from consumer.cli.options import AsJson, Bootstrap, ConfigFile, DryRun, Group, Yes, configuration
from consumer.cli.output import EXIT_FAILURE, EXIT_USAGE, Failure, complain, note, say, say_json, say_table

if TYPE_CHECKING:
    from consumer.config import Config
    from consumer.kafka.tools import Outgoing, Record

LINES_AT_ONCE: Final = 200
"""Lines read in one go from a file; from a pipe each one is sent when it comes."""
LINE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Longest line: a payload of any allowed size in base64, far from what would fill the memory."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(produce)
    app.command(short_help="Show responses as JSON lines.")(tail)
    app.command()(lag)


# ------------------------------------------------------------------------------------------------- produce


def produce(
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="F.jsonl|-", help="JSON lines; - is standard input.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", metavar="N", min=1, help="At most N; without --file synthetic inserts.")
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", metavar="R", min=0.001, help="Records a second.")] = None,
    topic: Annotated[
        str | None, typer.Option("--topic", metavar="TOPIC", help="Default: the first of input.topics.")
    ] = None,
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Put operations on the input topic.

    A line: {"kind": "insert", "usecase": "u", "scopes": [["org", "1"]], "key": "k", "payload": "text", "ttl": "1h"}.
    Instead of payload: payload_base64, payload_file, payload_reference. A bad line is named and skipped; then the exit
    code is 1.
    """
    del yes  # there is nothing to ask
    if file is None and count is None:
        raise Failure("nothing to produce", "give --file F.jsonl, --file -, or --count N", exit_code=EXIT_USAGE)
    settings = configuration(config, bootstrap)
    target = topic or settings.input.topics[0]
    with _source(file, count) as lines:
        run = _Produce(settings, target, lines, count, rate)
        asyncio.run(run.dry() if dry_run else run.send())
    if as_json:
        say_json({"topic": target, "sent": run.sent, "bad": run.bad}, line=True)
    else:
        what = "would be sent" if dry_run else "sent"
        say(f"{run.sent} records {what} to {target}" + (f", {run.bad} bad lines skipped" if run.bad else ""))
    if run.bad:
        raise typer.Exit(EXIT_FAILURE)


@contextmanager
def _source(file: str | None, count: int | None) -> Iterator[BinaryIO | list[str]]:
    import sys

    from consumer.cli.lines import synthetic

    if file is None:
        yield synthetic(count or 0)
        return
    try:
        opened = nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise Failure(f"{file}: {error.strerror}", exit_code=EXIT_USAGE) from None
    with opened as stream:
        yield stream


class _Produce:
    """One run of ``produce``: lines to records, and the count of both kinds of outcome."""

    def __init__(
        self, config: Config, topic: str, lines: BinaryIO | list[str], count: int | None, rate: float | None
    ) -> None:
        self._config = config
        self._topic = topic
        self._lines = lines
        self._count = count
        self._rate = rate
        self._numbers: list[int] = []
        """Line numbers of records that were handed out and have no outcome yet."""
        self.sent = 0
        self.bad = 0

    async def send(self) -> None:
        """Send everything."""
        from consumer.kafka import tools

        async with aclosing(tools.produce(self._config, self._topic, self._records(), rate=self._rate)) as outcomes:
            async for error in outcomes:
                number = self._numbers.pop(0)
                if error is None:
                    self.sent += 1
                else:
                    self._name(number, str(error))

    async def dry(self) -> None:
        """Read everything, and say what would be sent."""
        async for record in self._records():
            self.sent += 1
            key = None if record.key is None else record.key.decode()
            place = "by key" if record.partition is None else f"partition {record.partition}"
            note(f"line {self._numbers.pop(0)}: {len(record.value or b'')} bytes, record key {key}, {place}")

    async def _records(self) -> AsyncIterator[Outgoing]:
        from consumer.cli.lines import BadLine, read_line

        limit = self._config.limits.record_bytes
        given = 0
        async for number, line in self._numbered():
            if not line.strip():
                continue
            if self._count is not None and given == self._count:
                return
            given += 1
            try:
                if "payload_file" in line if isinstance(line, str) else b"payload_file" in line:
                    record = await asyncio.to_thread(read_line, line, payload_bytes_max=limit)
                else:
                    record = read_line(line, payload_bytes_max=limit)
            except BadLine as error:
                self._name(number, str(error))
            else:
                self._numbers.append(number)
                yield record

    async def _numbered(self) -> AsyncIterator[tuple[int, bytes | str]]:
        """Yield lines with their numbers; a stream is read in a thread, since a pipe may have nothing for a while."""
        if isinstance(self._lines, list):
            for numbered in enumerate(self._lines, 1):
                yield numbered
            return
        stream, number = self._lines, 0
        at_once = LINES_AT_ONCE if stream.seekable() else 1
        while lines := await asyncio.to_thread(_some_lines, stream, at_once):
            for line in lines:
                number += 1
                yield number, line

    def _name(self, number: int, why: str) -> None:
        self.bad += 1
        complain(f"line {number}: {why}")


def _some_lines(stream: BinaryIO, most: int) -> list[bytes]:
    return list(islice(iter(lambda: stream.readline(LINE_BYTES_MAX), b""), most))


# ------------------------------------------------------------------------------------------------- tail


def tail(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    from_beginning: Annotated[bool, typer.Option("--from-beginning", help="Begin with the oldest.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", "-n", metavar="N", min=1, help="At most N.")] = None,
    topic: Annotated[str | None, typer.Option("--topic", metavar="TOPIC", help="Default: the output topic.")] = None,
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    as_json: AsJson = False,
) -> None:
    """Show responses as JSON lines: the last ones (10, or --limit), all of them, or those that come.

    A record that is no response is shown with its error; then the exit code is 1.
    """
    del as_json  # they are JSON in any case
    settings = configuration(config, bootstrap)
    undecodable = asyncio.run(_tail(settings, topic or settings.output.topic, follow, from_beginning, limit))
    if undecodable:
        raise Failure(f"{undecodable} records could not be decoded")


async def _tail(settings: Config, topic: str, follow: bool, from_beginning: bool, limit: int | None) -> int:
    from consumer.kafka import tools

    undecodable = 0
    found = tools.tail(settings, topic, follow=follow, from_beginning=from_beginning, limit=limit)
    async with aclosing(found) as records:
        async for record in records:
            line = response_line(record, settings.output.framing)
            undecodable += "error" in line
            say_json(line, line=True)
    return undecodable


def response_line(record: Record, framing: str) -> dict[str, Any]:
    """Return a response as it is shown: its fields, then where it lies; or why it cannot be decoded."""
    from consumer.cli.lines import header_pairs, shown
    from consumer.codec import decode_response
    from consumer.errors import DecodeError

    place = {"partition": record.partition, "offset": record.offset, "headers": header_pairs(record.headers)}
    value = record.value
    if framing == "confluent" and value is not None and value[:1] in {b"\x00", b"\x01"}:
        value = value[5 if value[0] == 0 else 17 :]
    if value is None:
        return {"error": {"code": "null_value", "message": "the record has no value"}, **place}
    try:
        return {**shown(decode_response(value)), **place}
    except DecodeError as error:
        return {"error": {"code": error.code, "message": str(error)}, **place}


# ------------------------------------------------------------------------------------------------- lag


def lag(
    config: ConfigFile = None, bootstrap: Bootstrap = None, group: Group = None, as_json: AsJson = False
) -> None:
    """Show how far the group is behind, per partition."""
    from consumer.kafka import tools

    settings = configuration(config, bootstrap, group)
    rows = asyncio.run(tools.lag(settings))
    if as_json:
        say_json(rows)
        return
    columns = ("topic", "partition", "committed", "end", "lag", "map_bytes", "finished_above_gap")
    say_table(columns, [dict(row) for row in rows])
    known = [row["lag"] for row in rows if row["lag"] is not None]
    note(f"group {settings.kafka.group_id}: {sum(known)} records behind in {len(known)} of {len(rows)} partitions")
