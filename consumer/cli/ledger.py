"""``verify``, ``replay``: whether every record has its one response, and putting records back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Final

import typer

from consumer.cli.options import AsJson, Bootstrap, ConfigFile, DryRun, Yes, configuration
from consumer.cli.output import EXIT_USAGE, Failure, complain, confirm, note, say, say_json
from consumer.cli.schemas import opened_registry

if TYPE_CHECKING:
    from consumer.config import Config
    from consumer.kafka.ledger import Verdict
    from consumer.kafka.ranges import Position
    from consumer.kafka.replay import Replay, Step

NAMED_MAX: Final = 20
"""Ids of a kind that are named in text; ``--json`` names all."""

CLOCK_SECONDS: Final = 3600
"""How much earlier than the first record, by their timestamps, a response may seem to be: producers and the service set
timestamps by clocks of their own."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(short_help="Check that every record has exactly one response.")(verify)
    app.command(short_help="Put records, or dead letters, back on their input.")(replay)


def position(option: str, text: str) -> Position:
    """Read the value of ``--from``, ``--to`` and their like.

    Raises:
        Failure: it is no place; exit 2.
    """
    from consumer.kafka.ranges import parse_position

    try:
        return parse_position(text)
    except ValueError as error:
        raise Failure(f"{option}: {error}", exit_code=EXIT_USAGE) from None


# ------------------------------------------------------------------------------------------------- verify


def verify(
    start: Annotated[
        str, typer.Option("--from", metavar="PLACE", help="earliest, latest, an offset, or an RFC 3339 time.")
    ] = "earliest",
    end: Annotated[str, typer.Option("--to", metavar="PLACE", help="As --from; exclusive.")] = "latest",
    topic: Annotated[
        str | None, typer.Option("--topic", metavar="TOPIC", help="Default: all of input.topics.")
    ] = None,
    responses_from: Annotated[
        str | None,
        typer.Option(
            "--responses-from",
            metavar="PLACE",
            help="Where responses are read from. Default: an hour before a time in --from, else earliest.",
        ),
    ] = None,
    wait: Annotated[
        str, typer.Option("--wait", metavar="DURATION", help="Go on looking for missing responses so long.")
    ] = "0s",
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="Exit 0 with them: at-least-once may repeat responses.")
    ] = False,
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    as_json: AsJson = False,
) -> None:
    """Check that every input record has exactly one response, and that it fits.

    Reads both topics again, and believes nothing the service says about itself. Exit 1 if anything is missing,
    duplicated or mismatched. On a running service, records still being worked on are missing: give --wait.
    """
    from datetime import datetime, timedelta

    from consumer.config import parse_duration
    from consumer.kafka.ledger import TooManyOffsets
    from consumer.kafka.ledger import verify as compare

    settings = configuration(config, bootstrap)
    first, last = position("--from", start), position("--to", end)
    try:
        seconds = parse_duration(wait)
    except ValueError as error:
        raise Failure(f"--wait {error}", exit_code=EXIT_USAGE) from None
    begin: Position = "earliest"
    if responses_from is not None:
        begin = position("--responses-from", responses_from)
    elif isinstance(first, datetime):
        begin = first - timedelta(seconds=CLOCK_SECONDS)
    topics = [topic] if topic is not None else list(settings.input.topics)

    async def run() -> Verdict:
        async with opened_registry(settings) as registry:
            return await compare(
                settings, topics, first, last, responses_from=begin, wait_seconds=seconds, registry=registry
            )

    try:
        verdict = asyncio.run(run())
    except TooManyOffsets as error:
        raise Failure(str(error), "narrow it with --from and --to, or name one --topic", exit_code=EXIT_USAGE) from None
    lines = _verdict_json(verdict) if as_json else _verdict_text(verdict)
    for line in lines:
        say(line)
    lost = sum(ledger.span.lost for ledger in verdict.ledgers.values())
    if lost:
        note(f"{lost} offsets of the range are no longer in the topic and were not looked at")
    wrong = [
        name
        for name, ids in (
            ("missing", verdict.missing()),
            ("duplicated", iter(()) if allow_duplicates else verdict.duplicated()),
            ("mismatched", verdict.mismatched()),
        )
        if next(ids, None) is not None
    ]
    if wrong:
        hints = {
            "missing": "`tierstream lag` and `tierstream why` tell whether they are still to come; --wait waits",
            "duplicated": "after a crash some are within the promise of at-least-once: --allow-duplicates",
            "mismatched": "`tierstream inspect TOPIC PARTITION OFFSET` shows a record",
        }
        raise Failure(f"there are {', '.join(wrong)} responses", hints[wrong[0]])


def _verdict_json(verdict: Verdict) -> Iterator[str]:
    """Write the verdict line by line: what is wrong may be as long as the topics."""
    yield "{"
    yield f'  "records": {verdict.records},'
    yield f'  "responses": {verdict.responses},'
    parts = (("missing", verdict.missing()), ("duplicated", verdict.duplicated()), ("mismatched", verdict.mismatched()))
    for name, ids in parts:
        last = "" if name == "mismatched" else ","
        held = next(ids, None)
        if held is None:
            yield f'  "{name}": []{last}'
            continue
        yield f'  "{name}": ['
        for identity in ids:
            yield f"    {json.dumps(held)},"
            held = identity
        yield f"    {json.dumps(held)}"
        yield f"  ]{last}"
    yield "}"


def _verdict_text(verdict: Verdict) -> Iterator[str]:
    kinds = {"missing": verdict.missing, "duplicated": verdict.duplicated, "mismatched": verdict.mismatched}
    counts = [f"{sum(1 for _ in ids())} {name}" for name, ids in kinds.items()]
    yield f"{verdict.records} records, {verdict.responses} responses: {', '.join(counts)}"
    for name, ids in kinds.items():
        found = ids()
        for identity in islice(found, NAMED_MAX):
            reason = verdict.reasons.get(identity) if name == "mismatched" else None
            yield f"{name:10}  {identity}" + (f": {reason}" if reason else "")
        if next(found, None) is not None:
            yield f"{name:10}  … and more; --json names all"


# ------------------------------------------------------------------------------------------------- replay


def replay(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="Where the records are; often the dead letter topic.")],
    partition: Annotated[int, typer.Argument(metavar="PARTITION", min=0)],
    start: Annotated[
        str, typer.Option("--from", metavar="PLACE", help="earliest, latest, an offset, or an RFC 3339 time.")
    ],
    end: Annotated[str, typer.Option("--to", metavar="PLACE", help="As --from; exclusive.")],
    code: Annotated[
        str | None, typer.Option("--code", metavar="CODE", help="Only dead letters of this failure.")
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", metavar="R", min=0.001, help="Records a second.")] = None,
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Put records back on the input topic, dead letters on the partition they came from.

    Headers are kept, those of a dead letter taken off, tierstream-replay-of added. The records are processed as new
    ones, after everything that is there: an older write put back wins over younger ones.
    """
    from consumer.errors import STATUS_BY_CODE

    if code is not None and code not in STATUS_BY_CODE:
        known = ", ".join(sorted(STATUS_BY_CODE))
        raise Failure(f"--code: no failure is called {code}", f"one of {known}", exit_code=EXIT_USAGE)
    settings = configuration(config, bootstrap)
    first, last = position("--from", start), position("--to", end)
    run = _Replay(dry_run=dry_run, yes=yes, code=code, rate=rate)
    asyncio.run(run(settings, topic, partition, first, last))
    if as_json:
        say_json(
            {
                "topic": topic,
                "partition": partition,
                "from": run.first,
                "to": run.last,
                "replayed": run.replayed,
                "skipped": run.skipped,
            },
            line=True,
        )
    else:
        what = "would be put back" if dry_run else "put back"
        say(f"{run.replayed} records {what}" + (f", {run.skipped} left out" if run.skipped else ""))
    if run.skipped:
        raise Failure(f"{run.skipped} records cannot be put back")


class _Replay:
    """One run of ``replay``, and its counts."""

    def __init__(self, *, dry_run: bool, yes: bool, code: str | None, rate: float | None) -> None:
        self._dry_run = dry_run
        self._yes = yes
        self._code = code
        self._rate = rate
        self.first = self.last = 0
        self.replayed = self.skipped = 0

    async def __call__(self, config: Config, topic: str, partition: int, start: Position, end: Position) -> None:
        """Find the range, ask, and do it."""
        from consumer.kafka.replay import open_replay

        async with open_replay(config, topic, partition, start, end, code=self._code) as found:
            self.first, self.last = found.span.start, found.span.end
            if self.first == self.last:
                note(f"there are no records of {topic}/{partition} in this range")
                return
            if not self._dry_run:
                confirm(self._question(found), yes=self._yes)  # nothing else has to run while somebody thinks
            async with aclosing(found.steps() if self._dry_run else found.run(self._rate)) as steps:
                async for step in steps:
                    self._count(step)

    def _question(self, found: Replay) -> str:
        span = found.span
        what = f"dead letters of {self._code}" if self._code is not None else "records"
        return (
            f"put the {what} at offsets {span.start} to {span.end - 1} of {span.topic}/{span.partition} "
            "back on the input topic?"
        )

    def _count(self, step: Step) -> None:
        if step.problem is not None:
            self.skipped += 1
            complain(f"{step.source}: {step.problem}")
            return
        self.replayed += 1
        if self._dry_run:
            place = "by key" if step.outgoing.partition is None else f"partition {step.outgoing.partition}"
            why = f", {step.code}" if step.code is not None else ""
            note(f"{step.source} to {step.topic}, {place}: {step.outgoing.size} bytes{why}")
