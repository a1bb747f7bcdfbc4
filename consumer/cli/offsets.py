"""``offset-map``, ``reset-offsets``: what the group has committed, and committing something else for it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from consumer.cli.options import AsJson, Bootstrap, ConfigFile, DryRun, Group, Yes, configuration
from consumer.cli.output import EXIT_USAGE, Failure, confirm, note, say, say_json, say_table


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    offset_map = typer.Typer(
        help="What the group has finished above its committed offsets, and will not run again.",
        short_help="What is finished above the committed offsets.",
        no_args_is_help=True,
    )
    offset_map.command("show", short_help="Show the stored offset map of every partition.")(show)
    offset_map.command("clear")(clear)
    app.add_typer(offset_map, name="offset-map")
    app.command("reset-offsets", short_help="Let the group go on elsewhere.")(reset_offsets)


# ------------------------------------------------------------------------------------------------- offset-map


def show(
    config: ConfigFile = None, bootstrap: Bootstrap = None, group: Group = None, as_json: AsJson = False
) -> None:
    """Show the stored offset map of every partition the group has committed.

    A map that is not valid has no effect, for the reason shown: records finished above the commit run again.
    """
    from consumer.kafka.group_offsets import stored_maps
    from consumer.offset_map import count

    settings = configuration(config, bootstrap, group)
    rows: list[dict[str, Any]] = [
        {
            "topic": stored.topic,
            "partition": stored.partition,
            "base": stored.map.base,
            "finished": [list(run) for run in stored.map.finished],
            "bytes": len(stored.metadata.encode()),
            "valid": stored.map.valid,
            "reason": stored.map.reason,
        }
        for stored in asyncio.run(stored_maps(settings))
    ]
    if as_json:
        say_json(rows)
        return
    columns = ("topic", "partition", "base", "finished", "bytes", "valid", "reason")
    say_table(columns, [row | {"finished": count(row["finished"])} for row in rows])
    finished = sum(count(row["finished"]) for row in rows if row["valid"])
    note(f"group {settings.kafka.group_id}: {finished} records finished above the commits of {len(rows)} partitions")


def clear(
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    group: Group = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove the stored offset maps; the committed offsets stay. The group must have no members.

    What the maps say is finished runs again, and is answered again.
    """
    from consumer.kafka.group_offsets import Stored, clear_maps
    from consumer.offset_map import count

    settings = configuration(config, bootstrap, group)

    def run(*, dry: bool) -> list[Stored]:
        return asyncio.run(clear_maps(settings, dry_run=dry))

    found = run(dry=True)
    if found and not dry_run:
        again = sum(count(stored.map.finished) for stored in found if stored.map.valid)
        name = settings.kafka.group_id
        confirm(f"Clear {len(found)} offset maps of group {name}? {again} records run again", yes=yes)
        found = run(dry=False)
    if as_json:
        say_json(
            [
                {
                    "topic": stored.topic,
                    "partition": stored.partition,
                    "committed": stored.offset,
                    "bytes": len(stored.metadata.encode()),
                }
                for stored in found
            ]
        )
    else:
        say(f"{len(found)} offset maps {'would be cleared' if dry_run else 'cleared'}")


# ------------------------------------------------------------------------------------------------- reset-offsets


def reset_offsets(
    to: Annotated[str, typer.Option("--to", metavar="PLACE", help="earliest, latest, an offset, or an RFC 3339 time.")],
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    group: Group = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let the group go on elsewhere, in every partition of the input topics. The group must have no members.

    Offset maps are cleared. Records passed over get no response; records gone back over are answered again.
    """
    from consumer.kafka.group_offsets import plan_reset, reset
    from consumer.kafka.ranges import parse_position

    settings = configuration(config, bootstrap, group)
    try:
        position = parse_position(to)
    except ValueError as error:
        raise Failure(f"--to: {error}", exit_code=EXIT_USAGE) from None
    moves = asyncio.run(plan_reset(settings, position))
    for move in moves:
        if move.offset != move.asked:
            note(f"{move.topic}/{move.partition}: {move.asked} is outside the log; {move.offset} is nearest")
    if not dry_run:
        passed = sum(max(0, move.offset - (move.committed or 0)) for move in moves if move.committed is not None)
        confirm(
            f"Reset group {settings.kafka.group_id} in {len(moves)} partitions? {passed} offsets would be passed over",
            yes=yes,
        )
        asyncio.run(reset(settings, moves))
    columns = ("topic", "partition", "committed", "offset")
    rows = [{column: getattr(move, column) for column in columns} for move in moves]
    if as_json:
        say_json(rows)
    else:
        say_table(columns, rows)
        note(f"group {settings.kafka.group_id} {'would be' if dry_run else 'was'} reset to {to}")
