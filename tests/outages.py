"""Storage that cannot be used for a while: by what happens to files, not by anything in the service."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path


@contextmanager
def locked(database: str | Path) -> Iterator[None]:
    """Hold a database's write lock: another process's reads go on, its writes wait, and fail as *busy*."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
