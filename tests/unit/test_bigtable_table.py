"""The edge to Google's client: imported late, closed in time, its credentials and its absence explained."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consumer import BigtableBackend, BigtableChangeLog
from consumer.config import CELL_BYTES_MAX, load
from consumer.errors import BackendUnavailable, ConfigError
from consumer.ids import ObjectContext, ObjectId
from consumer.storage import bigtable_table
from consumer.storage.bigtable_table import BigtableTable, TableName, vendor
from consumer.storage.factory import make_change_log, make_high_volume

ROOT = Path(__file__).parents[2]

AN_ID = ObjectId(ObjectContext("u"), "k")


def test_the_names_cost_nothing_until_they_are_used() -> None:
    """Contract 10: heavy clients only on use, the health check and `--help` never pay for them."""
    program = (
        "import sys; from consumer import BigtableBackend, BigtableChangeLog;"
        "import consumer.storage.factory;"
        "sys.exit(any(name.partition('.')[0] in {'google', 'grpc'} for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("make", [BigtableBackend, BigtableChangeLog])
def test_without_the_client_the_error_says_what_to_install(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 11: configuration."""
    vendor.cache_clear()
    monkeypatch.setitem(sys.modules, "google.cloud.bigtable", None)
    with pytest.raises(ConfigError, match=r"pip install tierstream\[bigtable\]"):
        make("p", "i", "t")
    vendor.cache_clear()


@pytest.fixture
def storage_section(tmp_path: Path) -> Any:
    """Return a configuration's section of storage, read from a file."""
    section = "{type: bigtable, project: p, instance: i, table: t, emulator_host: 'h:1', app_profile: a"
    file = tmp_path / "c.yaml"
    file.write_text(f"storage:\n  high_volume: {section}}}\n  change_log: {section}, owner: me, lease: 7s}}\n")
    return load(file, {}).storage


async def test_sections_of_the_configuration_become_backends(storage_section: Any) -> None:
    """Contract 5: all settings arrive."""
    backend, log = make_high_volume(storage_section.high_volume), make_change_log(storage_section.change_log)

    assert isinstance(backend, BigtableBackend)
    assert isinstance(log, BigtableChangeLog)
    assert backend.inline_bytes_max == CELL_BYTES_MAX["bigtable"]
    assert backend._table._name == log._table._name == TableName("p", "i", "t", "h:1", "a")
    assert (log.owner, log._lease_micros) == ("me", 7_000_000)
    await log.close()
    await backend.close()


async def test_credentials_that_are_missing_are_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text says where they may come from."""
    from google import auth

    def none_found() -> Any:
        raise auth.exceptions.DefaultCredentialsError("a path")

    monkeypatch.delenv("BIGTABLE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(auth, "default", none_found)
    with pytest.raises(ConfigError, match="GOOGLE_APPLICATION_CREDENTIALS") as raised:
        await BigtableBackend("p", "i", "t").get_tiered(AN_ID)
    assert "a path" not in str(raised.value)


async def test_credentials_that_do_not_come_in_time_are_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metadata server that hangs; the event loop is not blocked meanwhile."""
    from google import auth

    let_go = threading.Event()
    monkeypatch.delenv("BIGTABLE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(auth, "default", let_go.wait)
    monkeypatch.setattr(bigtable_table, "CONNECT_SECONDS", 0.01)
    with pytest.raises(BackendUnavailable, match="in time"):
        await BigtableBackend("p", "i", "t").get_tiered(AN_ID)
    let_go.set()


class HangingClient:
    """A client whose connection does not close."""

    async def close(self, **_limits: float) -> None:
        await asyncio.Event().wait()


class Exporter:
    """What exports metrics; ending it blocks."""

    def __init__(self) -> None:
        self.closed_in: list[int] = []

    def close(self) -> None:
        self.closed_in.append(threading.get_ident())


class IdleTable:
    """A table with nothing to let go of."""

    async def close(self) -> None:
        return None


def connected(client: Any) -> BigtableTable:
    """Return a table that holds *client*."""
    table = BigtableTable(TableName("p", "i", "t"), {})
    table._client, table._table = client, IdleTable()
    return table


async def test_closing_a_connection_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping has its time; a second close finds nothing to do."""
    monkeypatch.setattr(bigtable_table, "CLOSE_SECONDS", 0.01)
    table = connected(HangingClient())
    await table.close()
    await table.close()


async def test_what_exports_metrics_is_ended_in_a_thread() -> None:
    """It sends a last request, and waits for it up to 30 s."""
    exporter = Exporter()

    class Client:
        _metrics = SimpleNamespace(handlers=[exporter])

        async def close(self, **_limits: float) -> None:
            for handler in self._metrics.handlers:
                handler.close()

    await connected(Client()).close()

    assert len(exporter.closed_in) == 1
    assert exporter.closed_in != [threading.get_ident()]
