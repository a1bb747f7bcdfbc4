"""From settings to storage: one backend per tier and the change log, each made from its own section and nothing else.

Making waits for no file and no network; :func:`open_parts` does, so that storage that may not be used is noticed at
start and ends it (contract 11), instead of failing every operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from consumer.errors import ConfigError
from consumer.storage.backend import ChangeLog, HighVolumeBackend, LongTermBackend
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog


class TierSettings(Protocol):
    """A tier's section; the attributes beside ``type`` depend on it (contract 5)."""

    @property
    def type(self) -> str:
        """What keeps the tier."""
        ...


class ChangeLogSettings(TierSettings, Protocol):
    """The change log's section."""

    @property
    def owner(self) -> str | None:
        """Whose entries these are; None = a name of this process alone."""
        ...

    @property
    def lease(self) -> float:
        """Seconds without a sign of life after which an owner is dead."""
        ...


class BucketReader(Protocol):
    """Opens objects in buckets."""

    async def open_object(self, bucket: str, name: str) -> Any:
        """Open an object, to be read once; what it raises stands at `consumer.references`."""
        ...

    async def close(self) -> None:
        """Let go of threads and connections; a second call does nothing."""
        ...


def make_high_volume(settings: TierSettings) -> HighVolumeBackend:
    """Make the high-volume tier: ``memory``, ``sqlite`` (``path``) or ``bigtable``.

    Raises:
        ConfigError: the type is unknown or not installed.
    """
    match settings.type:
        case "memory":
            return MemoryBackend(latency=getattr(settings, "latency", 0.0))
        case "sqlite":
            return SqliteBackend(_path(settings))
        case "bigtable":
            return cast("HighVolumeBackend", _extra("bigtable", "BigtableBackend").from_settings(settings))
        case unknown:
            raise ConfigError(f"storage.high_volume.type is memory, sqlite or bigtable, not {unknown}")


def make_long_term(
    settings: TierSettings, base_uri: str | None = None, *, at_once: int | None = None
) -> LongTermBackend:
    """Make the long-term tier: ``memory``, ``filesystem`` (``path``) or ``gcs``.

    Args:
        settings: Its section.
        base_uri: ``references.base_uri``: what takes the place of a folder's ``file:`` URI.
        at_once: Operations that may run at a time, for what is sized by them; None = those of a default process.

    Raises:
        ConfigError: the type is unknown or not installed.
    """
    match settings.type:
        case "memory":
            return MemoryBackend(latency=getattr(settings, "latency", 0.0))
        case "filesystem":
            return FilesystemBackend(_path(settings), base_uri=base_uri)
        case "gcs":
            return cast("LongTermBackend", _extra("gcs", "GcsBackend").from_settings(settings, threads=at_once))
        case unknown:
            raise ConfigError(f"storage.long_term.type is memory, filesystem or gcs, not {unknown}")


def make_change_log(settings: ChangeLogSettings) -> ChangeLog:
    """Make the change log: ``memory``, ``sqlite`` (``path``) or ``bigtable``.

    Raises:
        ConfigError: the type is unknown or not installed.
    """
    match settings.type:
        case "memory":
            return MemoryChangeLog(settings.owner)
        case "sqlite":
            return SqliteChangeLog(_path(settings), settings.owner, settings.lease)
        case "bigtable":
            return cast(
                "ChangeLog", _extra("bigtable", "BigtableChangeLog", "bigtable_change_log").from_settings(settings)
            )
        case unknown:
            raise ConfigError(f"storage.change_log.type is memory, sqlite or bigtable, not {unknown}")


def make_bucket_reader(allowed_prefixes: Sequence[str], long_term: LongTermBackend) -> BucketReader | None:
    """Make what opens payload references to objects in buckets, None where none are allowed.

    The client of the long-term tier where that is ``gcs``, so that the tier may copy what is opened; else one of its
    own, with the default credentials of the environment.

    Raises:
        ConfigError: it is not installed.
    """
    if not any(prefix.startswith("gs://") for prefix in allowed_prefixes):
        return None
    client = getattr(long_term, "gcs", None)
    if client is None:
        client = _extra("gcs", "GcsClient")()
    return cast("BucketReader", client)


async def open_parts(*parts: HighVolumeBackend | LongTermBackend | ChangeLog) -> None:
    """Create or check what the parts keep their data in, where they have something to open.

    Raises:
        ConfigError: a newer version, another program or another host has it.
        BackendUnavailable: a passing fault; the parts open themselves at their first use.
        BackendError: a permanent fault, such as a missing permission.
    """
    for part in parts:
        opening = getattr(part, "open", None)
        if opening is not None:
            await opening()


def _path(settings: TierSettings) -> Path:
    path: Path = getattr(settings, "path")  # noqa: B009 - which attributes a section has is decided by its type
    return path


def _extra(name: str, made: str, module: str | None = None) -> Any:
    """Return the class *made* of a backend whose vendor package is an extra, imported only now because it is slow."""
    try:
        return getattr(import_module(f"consumer.storage.{module or name}"), made)
    except ModuleNotFoundError:
        raise ConfigError(f"storage type {name} needs the extra: pip install tierstream[{name}]") from None
