"""What lies in the two tiers, read from their files by SQL and `os.walk`: nothing of the service takes part in it.

The high-volume tier's table says where its redirects point to; a description beside each payload of the long-term tier
says whose it is. After recovery the one names exactly what the other holds. Kept longer is what the change log keeps
for readers who were given a reference (``not_before``), and nothing else.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

REDIRECTS = "SELECT target FROM objects WHERE target IS NOT NULL AND (expires IS NULL OR expires > ?)"

KEPT = "SELECT old_revision, new_revision FROM change_log_entries WHERE not_before > ?"


@dataclass(frozen=True)
class Scan:
    """What was found."""

    redirects: int
    wrong: list[str]


def scan(database: str | Path, folder: str | Path) -> Scan:
    """Compare a SQLite file and a folder at which nobody is at work."""
    now = time.time_ns() // 1000
    with closing(sqlite3.connect(database)) as tables:
        targets = [target for (target,) in tables.execute(REDIRECTS, (now,))]
        kept = {name for names in tables.execute(KEPT, (now,)) for name in names}
    wrong = []
    held: set[str] = set()
    for where, folders, files in os.walk(folder):
        if where == str(folder):
            continue  # the tier's own marks
        here = Path(where)
        if here == Path(folder) / "incoming":
            wrong += [f"a temporary file is left: {name}" for name in files]
            folders.clear()
            continue
        described = {name.removesuffix(".json") for name in files if name.endswith(".json")}
        stored = {name.removesuffix(".payload") for name in files if name.endswith(".payload")}
        wrong += [f"without a description: {here / name}.payload" for name in sorted(stored - described)]
        wrong += [f"without a payload: {here / name}.json" for name in sorted(described - stored)]
        known = {f"{name}.{kind}" for name in stored | described for kind in ("json", "payload")}
        wrong += [f"neither payload nor description: {here / name}" for name in sorted(set(files) - known)]
        for name in described & stored:
            said = json.loads((here / f"{name}.json").read_bytes().partition(b"\n")[0])
            held.add(said["name"])
            if (size := (here / f"{name}.payload").stat().st_size) != said["size"]:
                wrong.append(f"{said['name']} has {size} bytes, not {said['size']}")
    wrong += [f"{rows} rows point to {name}" for name, rows in Counter(targets).items() if rows > 1]
    wrong += [f"a row points to {name}, which is not there" for name in sorted(set(targets) - held)]
    wrong += [f"no row points to {name}" for name in sorted(held - set(targets) - kept)]
    return Scan(len(targets), wrong)
