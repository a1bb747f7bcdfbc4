"""``inspect``, ``why``, ``top``: one record as it is, and what the running service does with its partitions."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from consumer.cli.options import AsJson, Bootstrap, ConfigFile, Url, configuration
from consumer.cli.output import Failure, end_on_sigterm, note, say, say_json
from consumer.cli.schemas import opened_registry
from consumer.cli.service import admin_address, cause_of, fetch

if TYPE_CHECKING:
    from rich.console import RenderableType

    from consumer.codec import OperationDecoder
    from consumer.config import Config
    from consumer.kafka.tools import Record
    from consumer.registry import SchemaRegistry

STATE_SECONDS: Final = 5.0
"""Longest wait for the service's state, which it has at hand."""

STATE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Most of a state that is read: 500 bytes a partition, for more partitions than a group can have."""

HEX_BYTES_MAX: Final = 1024
"""Bytes of a value that are dumped in text: 64 lines."""

SHOWN_BYTES_MAX: Final = 200
"""Bytes of a key or payload that are shown in text; ``--json`` has all."""

SLOW_SECONDS: Final = 1.0
"""An operation that takes longer than this is what its partition waits for; a fast one is only on its way."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(short_help="Show one record, decoded, or why it cannot be.")(inspect)
    app.command()(why)
    app.command()(top)


def printable(text: str) -> str:
    """Return *text* without anything that a terminal would act on, or that could pass for another line."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


# ------------------------------------------------------------------------------------------------- inspect


def inspect(
    topic: Annotated[str, typer.Argument(metavar="TOPIC")],
    partition: Annotated[int, typer.Argument(metavar="PARTITION", min=0)],
    offset: Annotated[int, typer.Argument(metavar="OFFSET", min=0)],
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    as_json: AsJson = False,
) -> None:
    """Show one record, decoded; its bytes and the reason if it cannot be.

    Operations are decoded as the service would decode them; records of the output topic as responses.
    """
    from consumer.kafka.ledger import told
    from consumer.kafka.tools import record_at

    settings = configuration(config, bootstrap)

    async def look() -> tuple[Record, dict[str, Any]]:
        record = await record_at(settings, topic, partition, offset)
        async with opened_registry(settings) as registry:
            schema_id = _decoder(settings).schema_id(record.value, record.headers)
            if registry is not None and schema_id is not None and not await told(registry, schema_id):
                note("the schema registry does not answer: what its schemas say cannot be known now")
            return record, record_fields(record, settings, registry)

    record, shown = asyncio.run(look())
    if as_json:
        say_json(shown)
        return
    for line in _record_lines(record, shown):
        say(line)


def record_fields(record: Record, config: Config, registry: SchemaRegistry | None = None) -> dict[str, Any]:
    """Return a record as ``inspect --json`` has it (contract 7); a response stands under ``response``.

    Args:
        record: As it was read.
        config: How operations are framed, and what is allowed.
        registry: Has been asked for the schema that the frame names; None = nobody knows it.
    """
    from consumer.cli.lines import header_pairs

    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "key_base64": None if record.key is None else base64.b64encode(record.key).decode(),
        "headers": header_pairs(record.headers),
        **_decoded(record, config, registry),
    }


def _decoder(config: Config, registry: SchemaRegistry | None = None) -> OperationDecoder:
    """Return a decoder like the service's."""
    from consumer.codec import OperationDecoder

    return OperationDecoder(
        framing=config.input.framing,
        record_bytes_max=config.limits.record_bytes,
        object_bytes_max=config.limits.object_bytes,
        elements_max=config.limits.avro_elements,
        usecases=config.usecases,
        resolver=registry,
    )


def _decoded(record: Record, config: Config, registry: SchemaRegistry | None) -> dict[str, Any]:
    """Return framing, schema id, and what the value is."""
    from consumer.cli.lines import shown
    from consumer.codec import decode_response, operation_fields
    from consumer.errors import DecodeError, OperationDropped
    from consumer.kafka.ledger import unframed

    if record.topic == config.output.topic or any(name == "tierstream-response-id" for name, _ in record.headers):
        frame: dict[str, Any] = {"framing": None if record.value is None else _framing(record.value), "schema_id": None}
        if record.value is None:
            return {**frame, "error": {"code": "null_value", "message": "the record has no value"}}
        try:
            return {**frame, "response": shown(decode_response(unframed(record.value, frame["framing"])))}
        except DecodeError as error:
            return {**frame, "error": {"code": error.code, "message": str(error)}}
    decoder = _decoder(config, registry)
    schema_id = decoder.schema_id(record.value, record.headers)
    decoded = decoder.decode(record.value, record.headers)
    framing = None
    if record.value is not None:
        framing = "bare" if schema_id is None else "confluent"
        if schema_id is not None and record.value.startswith(b"\xc3\x01") and len(schema_id) == 16:
            framing = "single-object"
    frame = {"framing": framing, "schema_id": schema_id}
    if decoded.operation is not None:
        return {**frame, "operation": shown(operation_fields(decoded.operation, decoded.request_id))}
    failure = decoded.error or OperationDropped("it has no operation")
    return {**frame, "error": {"code": failure.code, "message": str(failure)}}


def _framing(value: bytes) -> str:
    """Tell how a response is framed; a bare one begins with byte 0 too, where its index is 0."""
    from consumer.codec import RESPONSE_PREFIX, decode_response
    from consumer.errors import DecodeError

    if value.startswith(RESPONSE_PREFIX):
        return "single-object"
    if value[:1] in {b"\x00", b"\x01"}:
        try:
            decode_response(value)
        except DecodeError:
            return "confluent"
    return "bare"


def _record_lines(record: Record, fields: Mapping[str, Any]) -> Iterator[str]:
    moment = datetime.fromtimestamp(record.timestamp / 1000, UTC) if record.timestamp >= 0 else None
    yield f"record     {record.topic}/{record.partition}/{record.offset}"
    yield f"timestamp  {'-' if moment is None else moment.isoformat(timespec='milliseconds')}"
    yield f"key        {'-' if record.key is None else _readable(record.key)}"
    for name, value in fields["headers"]:
        yield f"header     {printable(name)}: {'-' if value is None else printable(value)}"
    if record.value is None:
        yield "value      -"
    else:
        schema = f", schema {fields['schema_id']}" if fields["schema_id"] is not None else ""
        yield f"value      {len(record.value)} bytes, {fields['framing']}{schema}"
    error = fields.get("error")
    if error is not None:
        yield f"error      {error['code']}: {printable(error['message'])}"
        yield from _hexdump(record.value or b"")
        return
    for part in ("operation", "response"):
        if part in fields:
            yield f"{part}:"
            for line in json.dumps(_short(fields[part]), ensure_ascii=False, indent=2).splitlines():
                yield printable(line)


def _readable(data: bytes) -> str:
    """Return bytes as text if they are some, else in hexadecimal; only the beginning of many."""
    more = f" … {len(data)} bytes" if len(data) > SHOWN_BYTES_MAX else ""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"0x{data[:SHOWN_BYTES_MAX].hex()}{more}"
    return printable(text[:SHOWN_BYTES_MAX]) + more


def _short(fields: Any) -> Any:
    """Return *fields* with payloads as people read them."""
    if isinstance(fields, Mapping):
        return {
            (name.removesuffix("_base64") if name == "payload_base64" else name): _readable(base64.b64decode(value))
            if name == "payload_base64"
            else _short(value)
            for name, value in fields.items()
        }
    return [_short(value) for value in fields] if isinstance(fields, list) else fields


def _hexdump(data: bytes) -> Iterator[str]:
    for at in range(0, min(len(data), HEX_BYTES_MAX), 16):
        row = data[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{at:08x}  {row[:8].hex(' '):23}  {row[8:].hex(' '):23}  |{text}|"
    if len(data) > HEX_BYTES_MAX:
        yield f"… and {len(data) - HEX_BYTES_MAX} more bytes"


# ------------------------------------------------------------------------------------------------- the running service


class NoState(Exception):
    """The service did not tell its state; the text says why."""


def _state(address: str) -> dict[str, Any]:
    """Ask the service for its state.

    Raises:
        NoState: it did not answer, or not with a state.
    """
    try:
        status, body = fetch(f"{address}/debug/state", STATE_SECONDS, STATE_BYTES_MAX)
    except OSError as error:
        raise NoState(f"no answer from {address}: {cause_of(error)}") from None
    try:
        state = json.loads(body)
        if status == 200 and isinstance(state, dict) and isinstance(state["partitions"], list):
            return state
    except (ValueError, KeyError):
        pass
    raise NoState(f"{address}/debug/state answers with status {status} and no state")


def _state_now(address: str) -> dict[str, Any]:
    try:
        return _state(address)
    except NoState as error:
        raise Failure(str(error), "--url names the admin port of a running service") from None


# ------------------------------------------------------------------------------------------------- why

_REASONS: Final[Mapping[str, str]] = {
    "at_capacity": "it has no permits: {in_use} of {limit} are taken, and it asks again",
    "bytes": "limits.in_flight_bytes is used up; it goes on when responses are acknowledged",
    "offset_distance": "reading is as far above unfinished offset {lowest} as may be",
    "poison_limit": "too many poison records (dead_letter.on_limit: pause); it stays paused until a restart",
    "storage_unavailable": "storage is unavailable; operations are tried again until it is back",
    "registry": "the schema registry does not answer, and is asked again",
    "output": "the brokers do not acknowledge responses",
    "out_of_range": "its committed offset {committed} is no longer in the topic (input.out_of_range: pause)",
    "recovering": "it is finding out where to go on",
}


def why(
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="Default: all.")] = None,
    partition: Annotated[int | None, typer.Argument(metavar="PARTITION", min=0, help="Default: all.")] = None,
    url: Url = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Say why partitions do not move, from the running service."""
    address = admin_address(url, config)
    attempts = None if url is not None else configuration(config).retry.attempts
    state = _state_now(address)
    chosen = [
        entry
        for entry in state["partitions"]
        if topic in {None, entry["topic"]} and partition in {None, entry["partition"]}
    ]
    if topic is not None and not chosen:
        name = topic if partition is None else f"{topic}/{partition}"
        held = ", ".join(f"{entry['topic']}/{entry['partition']}" for entry in state["partitions"]) or "none"
        raise Failure(f"this process does not have {name}", f"it has: {held}; other processes have their own --url")
    rows = [{**entry, "words": words(entry, state, attempts)} for entry in chosen]
    if as_json:
        say_json(rows)
        return
    if state["state"] != "running":
        say(f"the service is {printable(str(state['state']))}")
    for row in rows:
        say(row["words"])
    if not rows:
        say("no partition is assigned to this process")


def words(entry: Mapping[str, Any], state: Mapping[str, Any], attempts: int | None = None) -> str:
    """Say what one partition does.

    Args:
        entry: The partition, as ``/debug/state`` has it.
        state: All of that.
        attempts: ``retry.attempts``, where it is known.
    """
    limiter = state.get("limiter") or {}
    known = {
        "in_use": limiter.get("in_use", "all"),
        "limit": limiter.get("limit", "all"),
        "lowest": entry["lowest_unfinished"],
        "committed": entry["committed"],
    }
    reasons = [_REASONS.get(reason, reason.replace("_", " ")).format(**known) for reason in entry["paused_for"]]
    oldest = entry["oldest"]
    if oldest is not None and (reasons or oldest["age_seconds"] >= SLOW_SECONDS or oldest["last_error"]):
        says = f"waits for offset {oldest['offset']} ({_operation(oldest, attempts)})"
    elif reasons:
        says = "is paused"
    elif entry["position"] is None or entry["lag"] is None:
        says = "has not begun: where to start, or where it ends, is not known yet"
    elif entry["in_flight"] or entry["buffered"]:
        says = f"moves: {entry['in_flight']} of {entry['window']} in flight, {entry['lag']} to go"
    elif entry["lag"]:
        says = f"has {entry['lag']} records to read, and none has come from the broker yet"
    else:
        says = "is idle: every record is answered"
    text = "; ".join([f"partition {entry['topic']}/{entry['partition']} {says}", *reasons])
    return printable(text)


def _operation(oldest: Mapping[str, Any], attempts: int | None) -> str:
    parts = [f"{oldest['kind'] or 'unknown'} {oldest['key_digest'] or ''}".strip(), f"{oldest['age_seconds']:.1f} s"]
    if oldest["attempts"] > 1 or oldest["last_error"]:
        of = f" of {attempts}" if attempts is not None and oldest["attempts"] <= attempts else ""
        parts.append(f"attempt {oldest['attempts']}{of}")
    if oldest["last_error"]:
        said = oldest.get("last_error_message")
        parts.append(f"{oldest['last_error']}: {said}" if said else oldest["last_error"])
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------- top


def top(
    url: Url = None,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.2, max=60, help="Between looks.")
    ] = 1.0,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Watch the running service until q or Ctrl-C. Once, where the output is no terminal or with --json."""
    address = admin_address(url, config)
    state = _state_now(address)
    if as_json:
        say_json(state)
        return
    from rich.console import Console

    terminal = sys.stdout.isatty()  # and not what FORCE_COLOR says of it: a pipe would be drawn into for ever
    console = Console(file=sys.stdout, highlight=False, force_terminal=terminal)
    if not terminal or console.is_dumb_terminal:
        console.print(screen(Sample(state, None, 0.0), rows=len(state["partitions"]), width=console.width))
        return
    _watch(console, address, state, interval)


def _watch(console: Any, address: str, state: dict[str, Any], interval: float) -> None:
    """Show what the service says, until q, Ctrl-C or SIGTERM; a service that is gone is waited for."""
    from rich.live import Live

    before, asked, trouble = None, time.monotonic(), None
    sample = Sample(state, None, 0.0)
    end_on_sigterm()
    try:
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                rows = max(1, console.height - HEAD_LINES)
                live.update(screen(sample, rows=rows, width=console.width, trouble=trouble), refresh=True)
                if _quit(pressed, interval):
                    return
                try:
                    before, state, last, asked = state, _state(address), asked, time.monotonic()
                    sample, trouble = Sample(state, before, asked - last), None
                except NoState as error:
                    trouble = str(error)
    except KeyboardInterrupt:
        return  # the way to end it


@contextmanager
def _keys() -> Iterator[int | None]:
    """Have keys arrive one by one and unseen; yield where from, None where nobody can press any."""
    if not sys.stdin.isatty():
        yield None
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _quit(keyboard: int | None, seconds: float) -> bool:
    """Wait for so many seconds; at once True where q is pressed meanwhile. Other keys say nothing."""
    deadline = time.monotonic() + seconds
    if keyboard is None:
        time.sleep(seconds)
        return False
    while (left := deadline - time.monotonic()) > 0:
        if select.select([keyboard], [], [], left)[0]:
            pressed = os.read(keyboard, 64)
            if not pressed or b"q" in pressed.lower():  # nothing: the terminal is gone
                return True
    return False


HEAD_LINES: Final = 6
"""Lines of the screen that are not partitions."""

BAR_WIDTH: Final = 10


class Sample:
    """A state, and the rates since the one before.

    Args:
        state: As ``/debug/state`` has it.
        before: The state before it, if there was one.
        seconds: Time between the two.
    """

    def __init__(self, state: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float) -> None:
        self.state = state
        self.partitions: Sequence[Mapping[str, Any]] = state["partitions"]
        self._seconds = seconds
        self._before = before
        self._finished = {
            (entry["topic"], entry["partition"]): _finished(entry)
            for entry in (before["partitions"] if before is not None else ())
        }

    def rate(self, entry: Mapping[str, Any]) -> float | None:
        """Records of a partition finished a second; None where that is not known."""
        now, then = _finished(entry), self._finished.get((entry["topic"], entry["partition"]))
        if now is None or then is None or self._seconds <= 0:
            return None
        return max(0.0, (now - then) / self._seconds)

    def total_rate(self, name: str) -> float | None:
        """Increase of one of the totals a second; None where that is not known."""
        if self._before is None or self._seconds <= 0:
            return None
        increase: int = self.state["totals"][name] - self._before["totals"][name]
        return max(0.0, increase / self._seconds)


def _finished(entry: Mapping[str, Any]) -> int | None:
    """Count finished offsets from the start of the partition; gaps count, as nobody knows them."""
    lowest: int | None = entry["lowest_unfinished"]
    return None if lowest is None else lowest + (entry["finished_above_gap"] or 0)


def screen(sample: Sample, *, rows: int, width: int, trouble: str | None = None) -> RenderableType:
    """Draw a sample: a head with the process's numbers, and a line per partition, the most troubled first.

    Args:
        sample: What to draw.
        rows: Lines there are for partitions.
        width: Columns there are.
        trouble: Why it is not the present state.
    """
    from rich.text import Text

    state, limiter, totals = sample.state, sample.state["limiter"], sample.state["totals"]
    records, responses = (_per_second(sample.total_rate(name)) for name in ("records", "responses"))
    permits = f"permits {limiter['in_use']}/{limiter['limit']}"
    throughput = f"records {totals['records']} ({records}/s)   responses {totals['responses']} ({responses}/s)"
    lines = [
        (f"tierstream {state['state']}   {permits}   partitions {len(sample.partitions)}", "bold"),
        (f"{throughput}   failures {totals['failures']}   poison {totals['poison']}", ""),
        (f"disconnected: {trouble}" if trouble is not None else "", "bold red"),
    ]
    ordered = sorted(sample.partitions, key=_trouble_of)
    lines += _table(sample, ordered[:rows], width)
    if len(ordered) > rows:
        lines.append((f"… and {len(ordered) - rows} more partitions", "dim"))
    drawn = Text(no_wrap=True, overflow="ellipsis")
    for number, (line, style) in enumerate(lines):
        drawn.append("\n" if number else "")
        drawn.append(_cut(printable(line), width), style)
    return drawn


def _table(sample: Sample, partitions: Sequence[Mapping[str, Any]], width: int) -> list[tuple[str, str]]:
    """Return lines and their styles; the names of partitions and the reasons share what the numbers leave."""
    cells = [("partition", "window", "lag", "rec/s", "oldest", "paused for")]
    for entry in partitions:
        oldest = entry["oldest"]
        cells.append(
            (
                f"{entry['topic']}/{entry['partition']}",
                _bar(entry),
                "-" if entry["lag"] is None else str(entry["lag"]),
                _per_second(sample.rate(entry)),
                "-" if oldest is None else f"{oldest['age_seconds']:.1f}s",
                ", ".join(entry["paused_for"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = max(0, width - sum(widths[1:5]) - 2 * 5)
    reasons = min(widths[5], max(len("paused for"), left - widths[0], left // 2))
    name = min(widths[0], max(0, left - reasons))
    lines: list[tuple[str, str]] = []
    for number, (partition, window, lag, rate, age, paused) in enumerate(cells):
        shown = partition if len(partition) <= name else "…" + partition[len(partition) - name + 1 :]
        numbers = f"{lag:>{widths[2]}}  {rate:>{widths[3]}}  {age:>{widths[4]}}"
        line = f"{shown:{name}}  {window:{widths[1]}}  {numbers}  {_cut(paused, reasons)}"
        lines.append((line.rstrip(), "bold" if not number else "yellow" if paused else ""))
    return lines


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _trouble_of(entry: Mapping[str, Any]) -> tuple[bool, float, int, str, int]:
    """Order partitions: paused ones, then by the age of their oldest operation, then by lag."""
    age = entry["oldest"]["age_seconds"] if entry["oldest"] is not None else 0.0
    slow = age if age >= SLOW_SECONDS else 0.0
    return not entry["paused_for"], -slow, -(entry["lag"] or 0), entry["topic"], entry["partition"]


def _bar(entry: Mapping[str, Any]) -> str:
    """Draw the window of a partition: how many of its permits are in use."""
    window, in_flight = entry["window"], entry["in_flight"]
    if not window:
        return "no permits"
    full = min(BAR_WIDTH, -(-in_flight * BAR_WIDTH // window))
    return f"{'#' * full}{'.' * (BAR_WIDTH - full)} {in_flight}/{window}"


def _per_second(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}"


