"""Settings become storage: every type its backend, every mistake one clear error, and nothing is touched on the way."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from consumer.config import Config
from consumer.errors import ConfigError
from consumer.storage import factory
from consumer.storage.factory import make_change_log, make_high_volume, make_long_term, open_parts
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog


def section(**settings: Any) -> Any:
    """Return a section of the settings."""
    return SimpleNamespace(**settings)


async def test_the_defaults_are_sqlite_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 5 and 6, from the real settings; objects and change log share one file."""
    monkeypatch.chdir(tmp_path)
    storage = Config().storage
    parts = (
        make_high_volume(storage.high_volume),
        make_long_term(storage.long_term),
        make_change_log(storage.change_log),
    )

    assert [type(part) for part in parts] == [SqliteBackend, FilesystemBackend, SqliteChangeLog]
    await open_parts(*parts)
    assert sorted(path.name for path in (tmp_path / "data").glob("objects*")) == [
        "objects",
        "objects.sqlite",
        "objects.sqlite-shm",
        "objects.sqlite-wal",
        "objects.sqlite.lock",
    ]
    for part in parts:
        await part.close()


async def test_each_tier_in_memory_is_one_of_its_own() -> None:
    """What one forgets the other must not."""
    high_volume, long_term = make_high_volume(section(type="memory")), make_long_term(section(type="memory"))
    log = make_change_log(section(type="memory", owner="me", lease=30.0))

    assert isinstance(high_volume, MemoryBackend)
    assert isinstance(long_term, MemoryBackend)
    assert high_volume is not long_term
    assert isinstance(log, MemoryChangeLog)
    assert log.owner == "me"
    await open_parts(high_volume, long_term, log)


async def test_the_change_logs_owner_and_lease_are_the_settings(tmp_path: Path) -> None:
    """Contract 5."""
    log = make_change_log(section(type="sqlite", path=tmp_path / "c.sqlite", owner="pod-7", lease=12.5))

    assert isinstance(log, SqliteChangeLog)
    assert (log.owner, log._lease_seconds) == ("pod-7", 12.5)
    await log.close()


@pytest.mark.parametrize("make", [make_high_volume, make_long_term, make_change_log])
def test_an_unknown_type_is_a_configuration_error(make: Any) -> None:
    """It names the setting and what it may be."""
    with pytest.raises(ConfigError, match=r"storage\.\w+\.type is memory, \w+ or \w+, not floppy"):
        make(section(type="floppy", owner=None, lease=30.0))


@pytest.mark.parametrize(
    ("make", "name", "made"),
    [
        (make_high_volume, "bigtable", "BigtableBackend"),
        (make_long_term, "gcs", "GcsBackend"),
        (make_change_log, "bigtable_change_log", "BigtableChangeLog"),
    ],
)
def test_a_cloud_type_comes_with_its_extra(make: Any, name: str, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the error says what to install; with it, the class gets its section."""
    extra = name.removesuffix("_change_log")
    settings = section(type=extra)

    class Backend:
        @staticmethod
        def from_settings(given: Any, **_sizes: Any) -> Any:
            return ("made from", given)

    installed = ModuleType(f"consumer.storage.{name}")
    setattr(installed, made, Backend)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, f"consumer.storage.{name}", None)
        with pytest.raises(ConfigError, match=rf"tierstream\[{extra}\]"):
            make(settings)
    monkeypatch.setitem(sys.modules, f"consumer.storage.{name}", installed)

    assert make(settings) == ("made from", settings)


async def test_what_has_nothing_to_open_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening is no part of the protocols."""
    opened: list[str] = []

    class Opens(MemoryBackend):
        async def open(self) -> None:
            opened.append("opened")

    await factory.open_parts(Opens(), MemoryBackend(), MemoryChangeLog())

    assert opened == ["opened"]
