"""``size``: from a load to the settings that carry it, with the arithmetic shown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consumer.cli.options import AsJson
from consumer.cli.output import EXIT_USAGE, Failure, note, say, say_json

if TYPE_CHECKING:
    from consumer.sizing import Load, Plan


class Policy(StrEnum):
    """``window.policy``."""

    EQUAL_SHARE = "equal-share"
    SHARE_OF_AVAILABLE = "share-of-available"


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(short_help="Size windows, permits and memory for a load.")(size)


def size(
    rate: Annotated[float, typer.Option("--rate", metavar="R", help="Operations a second, all partitions together.")],
    p50: Annotated[str, typer.Option("--p50", metavar="TIME", help="Median of a storage operation, as 20ms.")],
    partitions: Annotated[int, typer.Option("--partitions", metavar="N", help="Of the input topics.")],
    p99: Annotated[
        str | None, typer.Option("--p99", metavar="TIME", help="99th percentile. Default: as the median.")
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", metavar="N", help="Members of the group, on all hosts together.")
    ] = 1,
    payload: Annotated[str, typer.Option("--payload", metavar="SIZE", help="A usual payload, as 4KiB.")] = "4KiB",
    headroom: Annotated[
        float, typer.Option("--headroom", metavar="X", help="Times the average: skew, and catching up.")
    ] = 2.0,
    policy: Annotated[
        Policy, typer.Option("--policy", metavar="equal-share|share-of-available", help="window.policy.")
    ] = Policy.EQUAL_SHARE,
    fraction: Annotated[
        str, typer.Option("--fraction", metavar="F", help="window.fraction, with share-of-available.")
    ] = "0.10",
    as_json: AsJson = False,
) -> None:
    """Size windows, permits and memory for a load, by Little's law.

    Prints the settings on stdout and the arithmetic on stderr, so that the former can go into a file. Latency and rate
    of a running service: tierstream_storage_request_duration_seconds, tierstream_operations_started_total.
    """
    from consumer.config import parse_duration, parse_size
    from consumer.permits import read_fraction
    from consumer.sizing import Load, plan

    def read(option: str, text: str, parse: Any) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise Failure(f"--{option} {error}", exit_code=EXIT_USAGE) from None

    try:
        load = Load(
            rate=rate,
            p50=read("p50", p50, parse_duration),
            p99=None if p99 is None else read("p99", p99, parse_duration),
            partitions=partitions,
            processes=processes,
            payload_bytes=read("payload", payload, parse_size),
            headroom=headroom,
            policy=policy.value,
            fraction=read("fraction", fraction, read_fraction),
        )
        planned = plan(load)
    except ValueError as error:
        raise Failure(str(error), "`tierstream size --help` has the units", exit_code=EXIT_USAGE) from None
    if as_json:
        say_json(_fields(load, planned))
        return
    for line in arithmetic(load, planned):
        note(line)
    for line in settings(load, planned):
        say(line)


def settings(load: Load, planned: Plan) -> Iterator[str]:
    """Yield the lines that go into the configuration file; what stays at its default is not there."""
    from consumer.config import format_size
    from consumer.sizing import IN_FLIGHT_BYTES_DEFAULT

    yield "concurrency:"
    yield f"  limit: {planned.limit}"
    yield "window:"
    yield f"  policy: {load.policy}"
    if load.policy == Policy.SHARE_OF_AVAILABLE.value:
        yield f"  fraction: {_decimal(load.fraction)}"
    if planned.in_flight_bytes != IN_FLIGHT_BYTES_DEFAULT:
        yield "limits:"
        yield f"  in_flight_bytes: {format_size(planned.in_flight_bytes)}"


def arithmetic(load: Load, planned: Plan) -> Iterator[str]:
    """Yield how the numbers came about, within 80 columns."""
    mean, window = _milliseconds(planned.mean_seconds), planned.window
    if load.p99 is None:
        yield f"latency      {mean}"
    else:
        yield f"latency      p50 {_milliseconds(load.p50)}, p99 {_milliseconds(load.p99)}: {mean} on average"
        yield "             (log-normal: p50 x e^(s^2/2), s = ln(p99/p50) / 2.326)"
    yield f"in flight    {load.rate:,.6g}/s x {mean} = {planned.in_flight:,.1f} at a time (Little's law),"
    yield f"             / {load.partitions} partitions = {planned.in_flight_each:,.2f} each"
    average = math.ceil(planned.in_flight_each * load.headroom - 1e-9)
    yield f"window       {planned.in_flight_each:,.2f} x {load.headroom:g} headroom = {average:,} permits"
    if window > average:
        yield f"             but at least L + 2.326 sqrt(L) = {window:,}: what 99 of 100 moments need"
    each = planned.partitions_each
    yield f"permits      {load.partitions} partitions / {planned.members} processes: up to {each} a process"
    if load.policy == Policy.EQUAL_SHARE.value:
        yield f"             {each} x {window:,} = {each * window:,}, divided equally"
    else:
        first, last = planned.windows[0], planned.windows[-1]
        yield f"             {planned.limit:,}, so that the last one has {last:,}; the first has {first:,}"
        yield f"             (each has {_decimal(load.fraction)} of what the ones before it left)"
    if planned.limit == planned.partitions_after_loss:
        yield f"             at least {planned.limit:,}: one for each partition that a process has"
        yield "             when another has gone"
    least, rate_max = planned.windows[-1], planned.rate_max
    yield f"carries      {least:,} / {mean} x {load.partitions} = {rate_max:,.0f} operations a second"
    if planned.windows_after_loss:
        least, rate_max = planned.windows_after_loss[-1], planned.rate_max_after_loss
        enough = "enough" if rate_max >= load.rate else "NOT ENOUGH: a larger --headroom"
        yield f"one gone     windows of {least:,}: {rate_max:,.0f} a second, {enough}"
    if load.processes > load.partitions:
        yield f"idle         {load.processes - load.partitions} processes: a partition has one"
    yield f"one object   at most {1 / planned.mean_seconds:,.0f} operations a second, with ordering: key"
    yield f"memory       {_mebibytes(planned.process_bytes)} a process at most, by measurements of this release:"
    yield f"             80 MiB + 1.2 x limits.in_flight_bytes ({_mebibytes(planned.in_flight_bytes)})"
    share = planned.cores / planned.members
    yield f"CPU          {planned.cores:.2g} cores or more, {share:.2g} a process, which has one"
    if planned.cores > planned.members:
        yield f"             NOT ENOUGH: {math.ceil(planned.cores)} processes or more"
    yield ""


def _fields(load: Load, planned: Plan) -> dict[str, Any]:
    """Return all of it as JSON can hold it."""
    from dataclasses import asdict

    given = asdict(load) | {"fraction": float(load.fraction)}
    config: dict[str, Any] = {"concurrency": {"limit": planned.limit}, "window": {"policy": load.policy}}
    if load.policy == Policy.SHARE_OF_AVAILABLE.value:
        config["window"]["fraction"] = float(load.fraction)
    config["limits"] = {"in_flight_bytes": planned.in_flight_bytes}
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(planned).items()}
    return {"load": given, "plan": found, "config": config}


def _decimal(fraction: Fraction) -> str:
    """Return a fraction as the decimal it was read from: one digit less would be another window."""
    return str(Decimal(fraction.numerator) / Decimal(fraction.denominator))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.4g} ms"


def _mebibytes(size: int) -> str:
    return f"{math.ceil(size / 1024 / 1024):,} MiB"
