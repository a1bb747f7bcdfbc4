"""A start over what crashes of long ago have left: nobody waits for its clean-up."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from brokers import Broker
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import Metadata
from consumer.storage.backend import RECOVERABLE_MAX, Change, Revision
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.revision import new_revision, uuid7
from consumer.storage.sqlite_change_log import SqliteChangeLog
from stages import SetStage

ENTRIES = 100_000
ORPHANS = 20
"""Entries at the head of the log whose revision is really there."""

UNFINISHED = "SELECT count(*) FROM change_log_entries WHERE not_before IS NULL"

MORE = """
WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)
INSERT INTO change_log_entries (change_id, owner, incarnation, object_path, new_revision)
SELECT printf('ffffffff-%04x-7000-8000-%012x', n / 65536, n), owner, incarnation, object_path, new_revision || n
FROM numbers, (SELECT * FROM change_log_entries ORDER BY sequence LIMIT 1)
"""


async def crash(file: Path, folder: Path) -> list[Revision]:
    """Leave what a process leaves that is killed in the middle of many changes; return the orphans."""
    context = ObjectContext("dead")
    change_log, long_term = SqliteChangeLog(file, "dead"), FilesystemBackend(folder)
    orphans: list[Revision] = []
    for number in range(ORPHANS):
        object_id = ObjectId(context, str(number))
        orphans.append(new_revision(object_id))
        await change_log.record(Change(uuid7(), object_id, orphans[-1], None))
        await long_term.put(orphans[-1], Metadata(), b"large")
    await change_log.close()
    await long_term.close()
    return orphans


async def still_there(folder: Path, revisions: list[Revision]) -> list[Revision]:
    """Those of *revisions* that can be read."""
    long_term = FilesystemBackend(folder)
    found = [revision for revision in revisions if await long_term.head(revision) is not None]
    await long_term.close()
    return found


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_start_over_a_hundred_thousand_entries_serves_at_once(embedded: Broker, set_stage: SetStage) -> None:
    """LOG-6, contract 6: partitions are taken and records answered while recovery has most of its work before it.

    Counted in entries, not seconds: there are nearly all of them left when the first records are answered. A stop in
    the middle of it all is clean, and leaves the rest to the next start.
    """
    stage = set_stage(embedded)
    file = Path(stage.config["storage"]["high_volume"]["path"])
    folder = Path(stage.config["storage"]["long_term"]["path"])
    orphans = asyncio.run(crash(file, folder))
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(MORE, (ENTRIES - ORPHANS,))

    def left() -> int:
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            found: tuple[int] = connection.execute(UNFINISHED).fetchone()
        return found[0]

    assert left() == ENTRIES
    service = stage.start(partitions=2)
    entries = [
        entry
        for number in range(100)
        for entry in stage.ledger.operate("insert", f"k{number}", b"x", partition=number % 2, statuses={201})
    ]
    stage.ledger.wait_answered(entries)
    at_first_answers = left()
    service.wait(lambda: left() <= ENTRIES - 2 * RECOVERABLE_MAX, "recovery to get on", 90)
    assigned = [line for line in service.log_lines() if line.get("event") == "partitions assigned"]
    service.stop()

    assert at_first_answers > ENTRIES // 2, "the service has waited for its recovery"
    assert len(assigned) == 1, "nobody was taken for dead"
    assert asyncio.run(still_there(folder, orphans)) == []
    assert 0 < left() < ENTRIES, "a stop waits for what is claimed, not for everything"
