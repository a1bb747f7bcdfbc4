"""``demo``, ``broker``, ``bench``: trying the service out on one machine."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from consumer.cli.options import AsJson, Bootstrap, ConfigFile, configuration
from consumer.cli.output import Failure, end_on_sigterm, note, say, say_json

if TYPE_CHECKING:
    from consumer.config import Config


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(short_help="Try the whole service here, and check each response.")(demo)
    app.command(short_help="Run the embedded development broker.")(broker)
    app.command(short_help="Measure the service against a bare client loop.")(bench)


def demo(
    source: Annotated[
        Path | None,
        typer.Option("--source", metavar="DIR", help="Folder of files to stream.", exists=True, file_okay=False),
    ] = None,
    records: Annotated[int | None, typer.Option("--records", metavar="N", min=1, help="Stop after N records.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Exit when done, instead of keeping the page up.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stream real files through the whole service on an embedded broker, and check every response."""
    from consumer.demo import main

    raise typer.Exit(main(source=source, records=records, wait=not no_wait, keep=keep, as_json=as_json))


def broker(
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 = any free port.")] = 9092,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help="Where to keep data. Default: a temporary folder.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Run the embedded development broker in the foreground, with the topics of the configuration, until Ctrl-C.

    Prints its address when it is up.
    """
    from consumer.broker import DevBroker
    from consumer.config import load

    with ExitStack() as stack:
        end_on_sigterm()
        folder = data_dir or Path(stack.enter_context(TemporaryDirectory(prefix="tierstream-broker-")))
        running = stack.enter_context(DevBroker(folder, port=port))
        settings = load(
            config, flags={"kafka.bootstrap_servers": running.bootstrap, "topics.replication_factor": 1}
        )
        topics = asyncio.run(_make_topics(settings))
        if as_json:
            say_json({"bootstrap": running.bootstrap, "topics": topics, "data_dir": str(folder)}, line=True)
        else:
            say(running.bootstrap)
            note(f"topics: {', '.join(topics)}; Ctrl-C ends it")
        code = running.wait()
        raise Failure(f"the broker ended with {code}", f"see {running.log}")


async def _make_topics(settings: Config) -> list[str]:
    from consumer.kafka.topics import Cluster, ensure_topics, needed_topics

    async with Cluster(settings) as cluster:
        await ensure_topics(cluster, settings)
    return sorted(needed_topics(settings))


def bench(
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    records: Annotated[int, typer.Option("--records", metavar="N", min=1, help="Records in all.")] = 200_000,
    partitions: Annotated[int, typer.Option("--partitions", metavar="N", min=1, help="Partitions of the topic.")] = 8,
    payload_bytes: Annotated[
        int, typer.Option("--payload-bytes", metavar="N", min=0, help="Payload of each insert.")
    ] = 1024,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Times each side is measured.")] = 3,
    exactly_once: Annotated[
        bool, typer.Option("--exactly-once", help="Also measure delivery in transactions.")
    ] = False,
    latency_ms: Annotated[
        float, typer.Option("--latency-ms", metavar="MS", min=0, help="Milliseconds that each operation waits.")
    ] = 0.0,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also tell what a record costs in each stage of the running service.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the service against a bare client loop on the same broker.

    Without --config and --bootstrap on an embedded broker.
    """
    from consumer.bench import main

    if bootstrap is None and config is not None:
        bootstrap = ",".join(configuration(config).kafka.bootstrap_servers)
    code = main(
        bootstrap=bootstrap,
        records=records,
        partitions=partitions,
        payload_bytes=payload_bytes,
        rounds=rounds,
        exactly_once=exactly_once,
        latency_ms=latency_ms,
        profile=profile,
        as_json=as_json,
    )
    raise typer.Exit(code)
