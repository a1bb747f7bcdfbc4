"""``demo``, ``broker``, ``bench``: trying the service out on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consumer.cli.options import AsJson, Bootstrap, ConfigFile


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(demo)
    app.command()(bench)


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

    raise typer.Exit(main(source=source, records=records, wait=not no_wait, keep=keep, json=as_json))


def bench(
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    records: Annotated[int, typer.Option("--records", metavar="N", min=1, help="Records in all.")] = 100_000,
    partitions: Annotated[int, typer.Option("--partitions", metavar="N", min=1, help="Partitions of the topic.")] = 4,
    payload_bytes: Annotated[
        int, typer.Option("--payload-bytes", metavar="N", min=0, help="Payload of each insert.")
    ] = 100,
    as_json: AsJson = False,
) -> None:
    """Measure the service against a bare client loop on the same broker; without --bootstrap on an embedded one."""
    from consumer.bench import main
    from consumer.config import load

    raise typer.Exit(
        main(
            config=load(config) if config is not None else None,
            bootstrap=bootstrap,
            records=records,
            partitions=partitions,
            payload_bytes=payload_bytes,
            json=as_json,
        )
    )
