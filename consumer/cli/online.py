"""``check-config --online``: whether what the configuration names is there, from the brokers to the storage.

Nothing is written or created. What cannot be asked without a side effect is listed as not checked, with the reason, so
that a clean report is not taken for more than it says.
"""

from __future__ import annotations

import asyncio
import base64
import os
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consumer.certificates import trusting
from consumer.config import Config, SchemaRegistry, format_size
from consumer.errors import ConfigError, TierstreamError
from consumer.kafka.topics import Cluster, ClusterRefusal, ClusterUnavailable, Topic, is_compacted, needed_topics

REGISTRY_SECONDS: Final = 5.0

STORAGE_SECONDS: Final = 30.0
"""For each part of storage: three attempts of a backend, and credentials before them."""

DEAD_LETTER_OVERHEAD_BYTES: Final = 64 * 1024
"""Key and headers beside a value of ``limits.record_bytes``."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    check: str
    ok: bool | None
    """None = not checked."""
    detail: str
    hint: str | None = None
    """What can be done about it."""

    def shown(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        hint = {} if self.hint is None else {"hint": self.hint}
        return {"check": self.check, "ok": self.ok, "detail": self.detail, **hint}


def check_online(config: Config) -> list[Check]:
    """Ask for everything; a part that does not answer becomes a failed check."""
    checks = asyncio.run(_collected(config))
    checks += [_registry(config.schema_registry), *_storage(config)]
    return checks


async def _collected(config: Config) -> list[Check]:
    return [check async for check in _kafka(config)]


async def _kafka(config: Config) -> AsyncIterator[Check]:
    try:
        async with Cluster(config) as cluster:
            identity = await cluster.cluster_id()
            yield Check("brokers", True, f"cluster {identity}, {await cluster.brokers()} up")
            async for check in _topics(cluster, config):
                yield check
            yield await _group(cluster, config)
            for check in _permissions(config):
                yield check
    except (ClusterUnavailable, ConfigError) as error:
        yield Check("brokers", False, str(error), error.hint)


async def _topics(cluster: Cluster, config: Config) -> AsyncIterator[Check]:
    needed = needed_topics(config)
    known: dict[str, Topic] = {}
    for name in needed:
        try:
            topic = (await cluster.topics([name]))[name]
        except ClusterRefusal as error:
            yield Check(f"topic {name}", False, str(error))
            continue
        if topic is not None:
            known[name] = topic
            yield Check(f"topic {name}", True, f"{topic.partitions} partitions")
        elif config.topics.create:
            yield Check(f"topic {name}", True, "missing; the service will create it, as topics.create is true")
        else:
            yield Check(f"topic {name}", False, "missing, and topics.create is false")
    try:
        settings = await cluster.settings(sorted(known), ["max.message.bytes", "cleanup.policy"]) if known else {}
    except ClusterRefusal as error:
        yield Check("topic settings", None, f"cannot be read: {error}")
        return
    for name in known:
        for check in _limits(config, name, settings.get(name, {})):
            yield check


def _limits(config: Config, topic: str, settings: dict[str, str]) -> Iterator[Check]:
    """Compare a topic's limit with those of the configuration."""
    text = settings.get("max.message.bytes", "")
    if not text.isdecimal():
        yield Check(f"max.message.bytes of {topic}", None, "the broker does not tell")
        return
    limit = int(text)
    if topic == config.output.topic:
        need, name = config.output.max_request_bytes, "output.max_request_bytes"
        lack = "larger responses would be refused by the broker"
        if is_compacted(settings):
            allowed = config.output.allow_compacted
            detail = "compacted" + (", which output.allow_compacted allows" if allowed else ": refused at start")
            yield Check(f"cleanup.policy of {topic}", allowed, detail)
    elif topic == config.dead_letter.topic:
        need, name = config.limits.record_bytes + DEAD_LETTER_OVERHEAD_BYTES, "limits.record_bytes + 64KiB"
        lack = "values of larger dead letters would be left out"
    else:
        need, name = config.storage.threshold + 1, "storage.threshold"
        lack = "objects of the long-term tier can only be inserted by reference"
        if limit <= need:  # a legal set-up, worth saying
            yield Check(f"max.message.bytes of {topic}", True, f"{limit} is below {name} ({need - 1}): {lack}")
            return
    fits = limit >= need
    detail = f"{limit}, {name} needs {format_size(need)}" + ("" if fits else f": {lack}")
    yield Check(f"max.message.bytes of {topic}", fits, detail)


async def _group(cluster: Cluster, config: Config) -> Check:
    name = config.kafka.group_id
    try:
        state = await cluster.group(name)
        commits = await cluster.committed(name)
    except ClusterRefusal as error:
        return Check(f"group {name}", False, str(error))
    if state.state == "Dead" and not commits:
        return Check(f"group {name}", True, "does not exist yet")
    return Check(f"group {name}", True, f"{state.state}, {state.members} members, {len(commits)} commits")


def _permissions(config: Config) -> Iterator[Check]:
    dead_letter = f" and {config.dead_letter.topic}" if config.dead_letter.topic else ""
    reason = "would need a record read or written, or the right to list permissions"
    yield Check(f"permission READ on {', '.join(config.input.topics)}", None, reason)
    yield Check(f"permission WRITE on {config.output.topic}{dead_letter}", None, reason)
    yield Check(f"permission READ on group {config.kafka.group_id}", None, "would need joining it")
    if config.delivery == "exactly-once":
        identities = f"permission WRITE on transactional ids {config.kafka.group_id}/…"
        yield Check(identities, None, "would fence the running service")


def _registry(registry: SchemaRegistry) -> Check:
    """Ask the schema registry for the kinds of schemas it knows: needs no right to any of them."""
    if registry.url is None:
        return Check("schema registry", True, "none is configured")
    headers = {"Accept": "application/json"}
    if registry.bearer_token is not None:
        headers["Authorization"] = f"Bearer {registry.bearer_token.get()}"
    elif registry.username is not None and registry.password is not None:
        pair = f"{registry.username}:{registry.password.get()}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    address = registry.url.rstrip("/") + "/schemas/types"
    try:
        context = trusting(registry.ssl_ca_file, "schema_registry.ssl_ca_file")
        request = urllib.request.Request(address, headers=headers)  # noqa: S310 - the configuration allows http and https
        with urllib.request.urlopen(request, timeout=REGISTRY_SECONDS, context=context) as answer:  # noqa: S310 - as above
            return Check("schema registry", True, f"answers with {answer.status}")
    except urllib.error.HTTPError as error:
        with error:
            return Check("schema registry", False, f"answers with {error.code}")
    except (OSError, ValueError, ConfigError) as error:
        return Check("schema registry", False, f"no answer: {error}")


def _storage(config: Config) -> Iterator[Check]:
    parts = (
        ("high_volume", config.storage.high_volume),
        ("long_term", config.storage.long_term),
        ("change_log", config.storage.change_log),
    )
    for name, part in parts:
        label = f"storage.{name} ({part.type})"
        path = getattr(part, "path", None)
        if path is not None:
            yield _writable(label, path, folder=part.type == "filesystem")
        elif part.type == "memory":
            yield Check(label, True, "nothing to check; objects are gone with the process")
        else:
            yield asyncio.run(_reachable(label, name, part))


async def _reachable(label: str, name: str, part: Any) -> Check:
    """Ask a cloud for what the service asks for when it opens its storage: table, families, bucket, and rights to them.

    Bigtable is asked with a write that changes nothing. A bucket is listed; writing to it would leave something.
    """
    from consumer.storage.factory import make_change_log, make_high_volume, make_long_term, open_parts

    makers: dict[str, Callable[[Any], Any]] = {
        "high_volume": make_high_volume,
        "long_term": make_long_term,
        "change_log": make_change_log,
    }
    try:
        async with asyncio.timeout(STORAGE_SECONDS):
            made = makers[name](part)
            try:
                await open_parts(made)
            finally:
                await made.close()
    except (TierstreamError, TimeoutError) as error:
        return Check(label, False, str(error) or f"no answer within {STORAGE_SECONDS:g} s")
    if name == "long_term":
        return Check(label, True, f"bucket {part.bucket} can be listed; that it can be written to is not checked")
    return Check(label, True, f"table {part.table} and its families are there and can be written to")


def _writable(label: str, path: Path, *, folder: bool) -> Check:
    """Whether the service could write *path*, or create it below the nearest folder that exists."""
    if path.exists():
        if path.is_dir() is not folder:
            return Check(label, False, f"{path} is {'no' if folder else 'a'} folder")
        writable = os.access(path, os.W_OK)
        return Check(label, writable, f"{path} {'exists' if writable else 'cannot be written'}")
    parent = next((above for above in path.absolute().parents if above.exists()), Path("/"))
    creatable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    return Check(label, creatable, f"{path} {'will be created' if creatable else f'cannot be created below {parent}'}")
