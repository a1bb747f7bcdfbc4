"""Every setting: its meaning, default and bounds, where its value comes from, and which values contradict each other.

One YAML file, plus environment, plus secret files. :func:`load` goes from the weakest source to the strongest:

1. *Defaults* are those of the models below; a field's docstring says what it does.
2. *YAML*: the file given, else the one named by ``TIERSTREAM_CONFIG``, else none.
3. *Secret files*: a directory of files named like ``kafka__sasl_password`` (``TIERSTREAM_SECRETS_DIR``, default
   :data:`SECRETS_DIR`); one trailing newline is stripped, files beginning with a dot are not looked at.
4. *Environment*: ``TIERSTREAM_KAFKA__GROUP_ID`` is ``kafka.group_id``. Lists are comma-separated; an empty value, or
   ``null``, means none where none is allowed. Names of usecases keep their case.
5. *Flags* of the command line.

Then the whole is validated, then settings that concern each other are compared (:func:`contradictions`). Whatever is
wrong is collected on the way and raised at once: each problem on its line, led by ``FILE:LINE`` or by the name of the
variable or secret file. A setting that is wrong by itself is left out of the comparison, so that one mistake is
reported once. No problem's text holds the value of a secret.

Durations are seconds (float) here and ``250ms``, ``30s``, ``1h30m`` outside; sizes are bytes (int) here and ``64MiB``,
``1MB`` or a number of bytes outside. Relative paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PrivateAttr,
    Tag,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from consumer.errors import ConfigError

ENV_PREFIX: Final = "TIERSTREAM_"
NESTING: Final = "__"
"""What stands for the dot of a setting's name in the names of variables and secret files."""

CONFIG_VARIABLE: Final = "TIERSTREAM_CONFIG"
SECRETS_VARIABLE: Final = "TIERSTREAM_SECRETS_DIR"
SECRETS_DIR: Final = Path("/run/secrets/tierstream")

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

RESPONSE_OVERHEAD_BYTES: Final = 64 * KIB
"""Room in a produce request beside the response itself: key and copied headers may have this much (contract 2.3)."""
REQUEST_MARGIN_SECONDS: Final = 5.0
"""A JoinGroup request lasts as long as the rebalance. It shares the client's request timeout; a join that times out
begins again, for ever (hazard H16d)."""
HEARTBEATS_PER_SESSION: Final = 3
"""Two lost heartbeats must not cost the membership."""
OBJECT_PREFIX_BYTES_MAX: Final = 80
"""Longest prefix of object names: with a revision's 937 bytes it stays under the 1,024 bytes of a GCS object name."""
CELL_BYTES_MAX: Final[Mapping[str, int]] = {"bigtable": 100_000_000, "sqlite": 1_000_000_000}
"""Largest value of one cell by type of high-volume tier: Bigtable's documented hard limit, SQLite's compiled one."""

SettingPath: TypeAlias = tuple[str, ...]
"""A setting as the names that lead to it: ``("kafka", "group_id")``."""

# ------------------------------------------------------------------------------------------------- kinds of values

_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_SIZE_UNITS: Final = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": KIB, "mib": MIB, "gib": GIB}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_duration(value: object) -> float:
    """Read a duration such as ``30s``, ``250ms``, ``1.5h`` or ``1h30m``; return seconds.

    Raises:
        ValueError: it is none; a bare number has no unit and is none, except 0.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        return 0.0
    text = value.strip() if isinstance(value, str) else ""
    if text == "0":
        return 0.0
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"is a duration such as 30s, 250ms or 5m, not {_shown(value)}")
    return float(sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts))


def format_duration(seconds: float) -> str:
    """Write a duration in the largest unit that holds it as a whole number; :func:`parse_duration` reads it back.

    One minute is 60s, to be easily compared with its neighbours 45s and 70s.
    """
    for unit in ("d", "h", "m", "s", "ms"):
        count = seconds / _DURATION_UNITS[unit]
        if count >= (2 if unit == "m" else 1) and abs(count - round(count)) < 1e-9:
            return f"{round(count)}{unit}"
    if seconds == 0:
        return "0s"
    return f"{seconds * 1000:.6f}".rstrip("0").rstrip(".") + "ms"


def parse_size(value: object) -> int:
    """Read a size such as ``64MiB``, ``1MB`` or a number of bytes; return bytes.

    Raises:
        ValueError: it is none, or not a whole number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = _SIZE_UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or (Fraction(found[1]) * unit).denominator != 1:
        raise ValueError(f"is a size such as 64MiB, 1MB or a number of bytes, not {_shown(value)}")
    return int(Fraction(found[1]) * unit)


def format_size(size: int) -> str | int:
    """Write a size in the largest binary unit that holds it as a whole number, else as plain bytes."""
    for name, unit in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{name}"
    return size


def _parse_fraction(value: object) -> Fraction:
    """Read a fraction as a decimal: 0.1 is one tenth, not the binary number nearest to it."""
    try:
        fraction = Fraction(0 if isinstance(value, bool) else str(value).strip())
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if not 0 < fraction <= 1:
        raise ValueError(f"is a decimal number above 0 and at most 1, not {_shown(value)}")
    return fraction


def _no_truth(value: object) -> object:
    """Refuse true and false where a number belongs; Python would take them for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"is a number, not {value}")  # noqa: TRY004 - pydantic collects ValueErrors
    return value


def _split(value: object) -> object:
    """Take a list also as one text with commas."""
    if isinstance(value, str):
        return [part for part in (piece.strip() for piece in value.split(",")) if part]
    return value


def _check_bootstrap(servers: list[str]) -> list[str]:
    wrong: list[str] = []
    for server in servers:
        host, colon, port = server.rpartition(":")
        if not (colon and host and port.isdecimal() and 0 < int(port) < 65536) or "/" in server:
            wrong.append(_shown(server))
    if wrong:
        raise ValueError(f"holds HOST:PORT, not {' or '.join(wrong)}")
    return servers


def _check_topic(topic: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", topic) or topic in {".", ".."}:
        raise ValueError(f"is a topic name: 1 to 249 of letters, digits, dot, _ and -, not {_shown(topic)}")
    return topic


def _check_topics(topics: list[str]) -> list[str]:
    if len(set(topics)) < len(topics):
        raise ValueError("names a topic twice")
    return [_check_topic(topic) for topic in topics]


def _check_prefixes(prefixes: list[str]) -> list[str]:
    wrong = [_shown(prefix) for prefix in prefixes if not re.fullmatch(r"(gs://[^/]+|file://)/(.*/)?", prefix)]
    if wrong:
        raise ValueError(
            f"holds prefixes like gs://BUCKET/ or file:///PATH/, ending with a slash, not {' or '.join(wrong)}"
        )
    return prefixes


def _check_object_prefix(prefix: str) -> str:
    if len(prefix.encode()) > OBJECT_PREFIX_BYTES_MAX or prefix.startswith(".") or not prefix.isprintable():
        raise ValueError(f"has at most {OBJECT_PREFIX_BYTES_MAX} bytes, all printable, the first one no dot")
    return prefix


def _check_http_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+\S*", url):
        raise ValueError("is an http:// or https:// address")
    return url


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class Secret:
    """A text that shows itself as ``***`` wherever it is printed; :meth:`get` returns it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def get(self) -> str:
        """Return the secret itself."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.chain_schema(
            [
                core_schema.no_info_before_validator_function(
                    lambda value: value.get() if isinstance(value, cls) else value,
                    core_schema.str_schema(min_length=1),
                ),
                core_schema.no_info_plain_validator_function(cls),
            ],
            serialization=core_schema.to_string_ser_schema(),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "minLength": 1}


Duration: TypeAlias = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": ["string", "integer"], "pattern": r"^(\d+(\.\d+)?(ms|s|m|h|d))+$|^0$", "maximum": 0}),
]
"""Seconds; ``30s``, ``250ms``, ``5m`` outside."""

PositiveDuration: TypeAlias = Annotated[Duration, Field(gt=0)]

Size: TypeAlias = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size),
    WithJsonSchema({"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)?\s*([kKmMgG]i?)?[bB]?$", "minimum": 0}),
]
"""Bytes; ``64MiB``, ``1MB`` outside."""

PositiveSize: TypeAlias = Annotated[Size, Field(gt=0)]

Share: TypeAlias = Annotated[
    Fraction,
    BeforeValidator(_parse_fraction),
    PlainSerializer(float, return_type=float),
    WithJsonSchema({"type": ["number", "string"], "exclusiveMinimum": 0, "maximum": 1}),
]
"""A part of a whole, above 0 and at most 1, exact."""

Number: TypeAlias = Annotated[int, BeforeValidator(_no_truth)]
Count: TypeAlias = Annotated[Number, Field(ge=1)]
Topic: TypeAlias = Annotated[str, AfterValidator(_check_topic)]
NonEmpty: TypeAlias = Annotated[str, Field(min_length=1)]


_LIST_SCHEMA: Final = WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]})
TextList: TypeAlias = Annotated[list[str], BeforeValidator(_split), _LIST_SCHEMA]
"""A list of texts; outside also one text with commas."""


# ------------------------------------------------------------------------------------------------- the sections


class _Section(BaseModel):
    """A section: frozen, without unknown settings, described by the docstrings of its fields."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class Oauth(_Section):
    """OAuth 2 client credentials for SASL OAUTHBEARER."""

    token_url: Annotated[str, AfterValidator(_check_http_url)]
    """Where tokens are asked for."""
    client_id: NonEmpty
    """Who asks."""
    client_secret: Secret
    """What proves it."""
    scope: NonEmpty | None = None
    """What for."""


class Kafka(_Section):
    """How brokers are reached, and the timing of the group."""

    bootstrap_servers: Annotated[TextList, Field(min_length=1), AfterValidator(_check_bootstrap)] = ["127.0.0.1:9092"]
    """Brokers to ask first, as HOST:PORT."""
    group_id: NonEmpty = "tierstream"
    """The consumer group. Also the beginning of every transactional id."""
    client_id: NonEmpty = "tierstream"
    """What brokers call this process in their logs and quotas."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_SSL", "SASL_PLAINTEXT"] = "PLAINTEXT"
    """Transport and authentication. Without SSL everything can be read on the way; that is said at start."""
    allow_insecure: bool = False
    """Allow SASL_PLAINTEXT: credentials over an unencrypted connection."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    """Required with SASL_SSL and SASL_PLAINTEXT."""
    sasl_username: NonEmpty | None = None
    """For PLAIN and SCRAM."""
    sasl_password: Secret | None = None
    """For PLAIN and SCRAM."""
    oauth: Oauth | None = None
    """For OAUTHBEARER."""
    ssl_ca_file: Path | None = None
    """PEM file of the authorities to trust; none = those of the system."""
    ssl_cert_file: Path | None = None
    """PEM file of the client's certificate."""
    ssl_key_file: Path | None = None
    """PEM file of the client's key; none = it is in the certificate's file."""
    ssl_key_password: Secret | None = None
    """Password of the client's key."""
    session_timeout: PositiveDuration = 45.0
    """A member not heard of for this long is put out of the group."""
    heartbeat_interval: PositiveDuration = 3.0
    """Time between signs of life; at most a third of the session timeout."""
    request_timeout: PositiveDuration = 70.0
    """Longest wait for a broker's answer. Above rebalance.timeout + 5 s, as joining the group is one request."""
    transaction_timeout: PositiveDuration = 30.0
    """After this the broker aborts an open transaction, which until then holds up read_committed readers."""


class Input(_Section):
    """What is read."""

    topics: Annotated[TextList, Field(min_length=1), AfterValidator(_check_topics)] = ["operations"]
    """Topics of operations."""
    framing: Literal["auto", "bare", "single-object", "confluent"] = "auto"
    """How values are framed; auto tells by the first byte and the headers."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where reading begins where the group has no commit. Partitions added later start at earliest."""
    out_of_range: Literal["pause", "earliest", "latest"] = "pause"
    """What happens when the committed offset no longer exists; pause = not ready, until somebody decides."""
    isolation: Literal["read_committed", "read_uncommitted"] = "read_committed"
    """Whether records of open and aborted transactions are read."""


class Output(_Section):
    """How responses are written."""

    topic: Topic = "responses"
    """The topic of responses."""
    framing: Literal["bare", "single-object", "confluent"] = "bare"
    """How values are framed; confluent needs a schema registry."""
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "lz4"
    """Compression of batches."""
    linger: Duration = 0.0
    """Wait for more responses before a batch is sent. One request is in flight per broker, so that batches form by
    themselves: waiting made it slower."""
    max_request_bytes: PositiveSize = 3 * MIB
    """Largest response with key and headers; the topic's max.message.bytes must not be below."""
    copy_headers: TextList = ["traceparent", "tracestate", "correlation-id"]
    """Headers of the input record that the response carries too."""
    allow_compacted: bool = False
    """Allow a compacted output topic; null keys are then replaced by the response id."""


class Topics(_Section):
    """Creating missing topics."""

    create: bool = False
    """Create missing topics at start. Else a missing topic ends the start with exit 2."""
    partitions: Count = 12
    """Partitions of a topic that is created."""
    replication_factor: Annotated[Number, Field(ge=1, le=32767)] = 3
    """Copies of a topic that is created."""


class DeadLetter(_Section):
    """Records that could not be worked on, and when there are too many of them."""

    topic: Topic | None = "operations.dlq"
    """The topic of dead letters; none = they are answered only."""
    max_consecutive: Count | None = None
    """Poison records in a row, in offset order within a partition, at which on_limit acts."""
    max_ratio: Annotated[float, BeforeValidator(_no_truth), Field(ge=0, le=1)] | None = None
    """Share of poison records within ratio_window above which on_limit acts."""
    ratio_window: Count = 1000
    """Records of a partition over which max_ratio is judged."""
    on_limit: Literal["pause", "stop"] = "pause"
    """pause = the partition, until restart; stop = the service, with exit 4."""


class SchemaRegistry(_Section):
    """A Confluent-compatible schema registry."""

    url: Annotated[str, AfterValidator(_check_http_url)] | None = None
    """Its address; none = framed values are answered with unknown_schema."""
    username: NonEmpty | None = None
    """For basic authentication."""
    password: Secret | None = None
    """For basic authentication."""
    bearer_token: Secret | None = None
    """Instead of user name and password."""
    ssl_ca_file: Path | None = None
    """PEM file of the authorities to trust; none = those of the system."""


class Concurrency(_Section):
    """The permits of one process."""

    limit: Count = 500
    """Most operations at a time in this process, over all partitions."""


class Window(_Section):
    """How many of the permits an assigned partition reserves."""

    policy: Literal["share-of-available", "equal-share"] = "share-of-available"
    """A share of the permits that are free when the partition is assigned; or the limit divided over the partitions."""
    fraction: Share = Fraction(1, 10)
    """The share of the free permits. With 0.10 each window is smaller than the one before; 44 use up 500."""
    exhausted: Literal["equal-share", "pause"] = "equal-share"
    """When permits do not suffice: divide all windows equally, or pause the partition."""


class Commit(_Section):
    """When finished offsets are committed."""

    interval: PositiveDuration = 1.0
    """At least this often, where something is finished (at-least-once)."""
    max_records: Count = 5000
    """Also after so many finished records of a partition."""
    transaction_interval: PositiveDuration = 0.1
    """How long a transaction gathers responses (exactly-once)."""


class Rebalance(_Section):
    """What a rebalance may cost."""

    timeout: PositiveDuration = 60.0
    """How long brokers wait for members to rejoin before they go on without them."""
    drain_timeout: PositiveDuration = 25.0
    """How long in-flight operations may take to finish when partitions are given up, and at shutdown."""


class Retry(_Section):
    """Trying again what failed in passing."""

    attempts: Count = 3
    """Attempts in all, the first included."""
    initial: Duration = 0.1
    """Longest wait before the second attempt; doubles with each one, evenly jittered from 0."""
    max: Duration = 5.0
    """Longest wait between attempts."""
    attempt_timeout: PositiveDuration = 20.0
    """Longest attempt."""
    exhausted: Literal["block", "answer"] = "block"
    """After the last attempt: pause the partition and go on trying, or answer with a failure."""


class Limits(_Section):
    """What one record, object or process may take up."""

    in_flight_bytes: PositiveSize = 256 * MIB
    """Records read and not yet answered, in this process, before reading pauses."""
    record_bytes: PositiveSize = 8 * MIB
    """Largest input record that is decoded."""
    object_bytes: PositiveSize = GIB
    """Largest object, also by reference."""
    response_bytes: PositiveSize = 2 * MIB
    """Largest response value; larger payloads are given by reference or refused."""
    avro_depth: Count = 64
    """Deepest nesting of a datum."""
    avro_elements: Count = 100_000
    """Most array items and map entries of a datum, in all."""


class References(_Section):
    """Payloads by reference (claim checks)."""

    allowed_prefixes: Annotated[TextList, AfterValidator(_check_prefixes)] = []
    """Where payloads may be read from: gs://BUCKET/… and file:///PATH/… with a slash at the end; none = nowhere."""
    in_responses: Literal["auto", "always", "never"] = "auto"
    """Whether payloads that do not fit a response are given by reference; auto: with gcs yes, else no."""
    base_uri: NonEmpty | None = None
    """What references in responses begin with in place of file:// and the path of storage.long_term.path."""
    retention: Duration = 3600.0
    """How long a replaced or deleted long-term revision stays readable by references given out before."""


class MemoryTier(_Section):
    """Objects in this process only; gone with it."""

    type: Literal["memory"]
    """memory"""
    latency: Duration = 0.0
    """What each request takes, for measurements; 0 = nothing."""


class SqliteTier(_Section):
    """Small objects in one SQLite file, for the processes of one host."""

    type: Literal["sqlite"] = "sqlite"
    """sqlite"""
    path: Path = Path("data/objects.sqlite")
    """The file."""


class BigtableTier(_Section):
    """Small objects in a Bigtable table."""

    type: Literal["bigtable"]
    """bigtable"""
    project: NonEmpty
    """Google Cloud project."""
    instance: NonEmpty
    """Bigtable instance."""
    table: NonEmpty
    """Table; `tierstream storage init` creates it."""
    emulator_host: NonEmpty | None = None
    """HOST:PORT of an emulator; implies anonymous credentials."""
    app_profile: NonEmpty | None = None
    """Application profile; it must route to a single cluster, as compare-and-swap needs that."""


class FilesystemTier(_Section):
    """Large objects in a folder, for the processes of one host."""

    type: Literal["filesystem"] = "filesystem"
    """filesystem"""
    path: Path = Path("data/objects")
    """The folder."""


class GcsTier(_Section):
    """Large objects in a Google Cloud Storage bucket."""

    type: Literal["gcs"]
    """gcs"""
    bucket: NonEmpty
    """The bucket."""
    endpoint: Annotated[str, AfterValidator(_check_http_url)] | None = None
    """Address of an emulator; implies anonymous credentials."""
    prefix: Annotated[str, AfterValidator(_check_object_prefix)] = ""
    """What all object names begin with."""


class _ChangeLog(_Section):
    owner: NonEmpty | None = None
    """Whose entries these are. A restart under the same name recovers at once; none = host name and random, whose
    entries others take over when the lease has run out."""
    lease: PositiveDuration = 30.0
    """An owner not heard of for this long is dead; others clean up after it."""


class MemoryChangeLog(_ChangeLog):
    """Changes remembered by this process only; what a crash leaves behind stays."""

    type: Literal["memory"]
    """memory"""


class SqliteChangeLog(_ChangeLog):
    """Changes in a SQLite file; it may be that of the high-volume tier."""

    type: Literal["sqlite"] = "sqlite"
    """sqlite"""
    path: Path = Path("data/objects.sqlite")
    """The file."""


class BigtableChangeLog(_ChangeLog, BigtableTier):
    """Changes in a Bigtable table; it may be that of the high-volume tier."""


def _tagged(default: str) -> Discriminator:
    """Tell the variants of a storage section by ``type``, which may be left out."""

    def tag(value: Any) -> Any:
        return value.get("type", default) if isinstance(value, dict) else getattr(value, "type", None)

    return Discriminator(tag)


HighVolume: TypeAlias = Annotated[
    Annotated[MemoryTier, Tag("memory")]
    | Annotated[SqliteTier, Tag("sqlite")]
    | Annotated[BigtableTier, Tag("bigtable")],
    _tagged("sqlite"),
]
LongTerm: TypeAlias = Annotated[
    Annotated[MemoryTier, Tag("memory")]
    | Annotated[FilesystemTier, Tag("filesystem")]
    | Annotated[GcsTier, Tag("gcs")],
    _tagged("filesystem"),
]
ChangeLog: TypeAlias = Annotated[
    Annotated[MemoryChangeLog, Tag("memory")]
    | Annotated[SqliteChangeLog, Tag("sqlite")]
    | Annotated[BigtableChangeLog, Tag("bigtable")],
    _tagged("sqlite"),
]


class Storage(_Section):
    """The two tiers and the change log between them."""

    threshold: Size = MIB
    """Objects up to and including this size live in the high-volume tier."""
    key_generation: Literal["derived", "random"] = "derived"
    """Keys of keyless inserts: derived from the record's position (a replay writes the same object), or random."""
    high_volume: HighVolume = SqliteTier()
    """memory, sqlite or bigtable."""
    long_term: LongTerm = FilesystemTier()
    """memory, filesystem or gcs."""
    change_log: ChangeLog = SqliteChangeLog()
    """memory, sqlite or bigtable."""


class Usecase(_Section):
    """What the objects of one usecase may do."""

    enabled: bool = True
    """Whether its operations are carried out at all."""
    expirations: Annotated[list[Literal["none", "ttl", "tti"]], BeforeValidator(_split), _LIST_SCHEMA] = [
        "none",
        "ttl",
        "tti",
    ]
    """Expiration policies an insert may have; none = without one."""
    max_seconds: Count | None = None
    """Longest expiration in seconds."""
    max_object_bytes: PositiveSize | None = None
    """Largest object."""


class Admin(_Section):
    """The admin port: status page, health, metrics."""

    host: NonEmpty = "127.0.0.1"
    """Address to listen on. Whoever reaches it can read the state of the service."""
    port: Annotated[Number, Field(ge=0, le=65535)] = 9464
    """0 = any free port, told in the "started" log line."""
    show_keys: bool = False
    """Show object keys as they are; else digests."""


class Log(_Section):
    """The log on stderr."""

    level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    """Lowest level that is written."""
    format: Literal["auto", "console", "json"] = "auto"
    """auto = console on a terminal, else json."""


class Runtime(_Section):
    """The process itself."""

    loop: Literal["auto", "asyncio", "uvloop"] = "auto"
    """Event loop; auto = uvloop where it is installed."""
    processes: Count = 1
    """Processes that share the partitions, each with permits of its own."""


UsecaseName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


class Config(_Section):
    """The whole configuration; made by :func:`load`, or in tests by keyword."""

    kafka: Kafka = Kafka()
    input: Input = Input()
    output: Output = Output()
    topics: Topics = Topics()
    dead_letter: DeadLetter = DeadLetter()
    schema_registry: SchemaRegistry = SchemaRegistry()
    concurrency: Concurrency = Concurrency()
    window: Window = Window()
    ordering: Literal["key", "unordered", "partition"] = "key"
    """key = operations on one object in their order; partition = one after the other; unordered = no order."""
    delivery: Literal["at-least-once", "exactly-once"] = "at-least-once"
    """exactly-once = responses and offsets in Kafka transactions."""
    commit: Commit = Commit()
    rebalance: Rebalance = Rebalance()
    retry: Retry = Retry()
    limits: Limits = Limits()
    references: References = References()
    storage: Storage = Storage()
    usecases: dict[UsecaseName, Usecase] = {}
    """Policies by usecase; one that is not listed may do everything."""
    admin: Admin = Admin()
    log: Log = Log()
    runtime: Runtime = Runtime()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def handout_seconds(self) -> float | None:
        """How long what a response has referred to stays readable; None where no response refers to anything."""
        wanted = self.references.in_responses
        if wanted == "never" or (wanted == "auto" and self.storage.long_term.type != "gcs"):
            return None
        return self.references.retention

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each value that is no default comes from, by dotted name: ``FILE:LINE``, a variable, a file, a flag."""
        return self._origins

    @property
    def warnings(self) -> Sequence[str]:
        """What is odd and no error, one sentence each; the service logs them at start."""
        return self._warnings

    def origin(self, setting: str) -> str:
        """Where the value of *setting* (``kafka.group_id``) comes from; ``default`` where nobody set it."""
        return self._origins.get(setting, "default")

    def shown(self) -> dict[str, Any]:
        """The effective values in the nesting of the YAML, secrets masked; reading them back gives this again."""
        return self.model_dump(mode="json")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the YAML file: names, kinds, bounds, defaults and descriptions of all settings."""
    schema = Config.model_json_schema()
    models: list[type[BaseModel]] = [Config, *_section_models([Config])]
    for model in models:
        described = schema if model is Config else schema["$defs"][model.__name__]
        defaults = model.model_construct().model_dump(mode="json")
        for name, described_field in described["properties"].items():
            if "default" in described_field:  # as people write it, not as this program keeps it
                described_field["default"] = defaults[name]
            _name_bounds(described_field)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_BOUNDS: Final = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}


def _name_bounds(described: dict[str, Any]) -> None:
    """Give bounds their names in JSON Schema: behind a validator pydantic leaves them under names of its own."""
    for part in [described, *described.get("anyOf", ())]:
        for ours, theirs in _BOUNDS.items():
            if ours in part:
                bound = part.pop(ours)
                if isinstance(part.get("type"), str):  # durations and sizes are texts as well
                    part[theirs] = bound


def _section_models(models: Iterable[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    for model in models:
        for info in model.model_fields.values():
            for below in _models(info.annotation):
                yield below
                yield from _section_models([below])


# ------------------------------------------------------------------------------------------------- contradictions


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A rule between settings that is broken."""

    settings: tuple[str, ...]
    """Dotted names of the settings concerned."""
    text: str
    """The rule in words; names the settings."""


Contradictions: TypeAlias = Iterator[Contradiction]


def contradictions(config: Config) -> Contradictions:
    """Yield every rule between settings that *config* breaks."""
    yield from _timing(config)
    yield from _sizes(config)
    yield from _security(config)
    yield from _combinations(config)


def _timing(config: Config) -> Contradictions:
    kafka, rebalance, commit, retry = config.kafka, config.rebalance, config.commit, config.retry
    show = format_duration
    if rebalance.drain_timeout >= rebalance.timeout:
        yield Contradiction(
            ("rebalance.drain_timeout", "rebalance.timeout"),
            f"rebalance.drain_timeout ({show(rebalance.drain_timeout)}) must be below rebalance.timeout "
            f"({show(rebalance.timeout)}): partitions are given away while they still drain",
        )
    if rebalance.timeout >= kafka.request_timeout - REQUEST_MARGIN_SECONDS:
        yield Contradiction(
            ("rebalance.timeout", "kafka.request_timeout"),
            f"rebalance.timeout ({show(rebalance.timeout)}) must be below kafka.request_timeout "
            f"({show(kafka.request_timeout)}) - {show(REQUEST_MARGIN_SECONDS)}: joining the group is one request",
        )
    if kafka.heartbeat_interval * HEARTBEATS_PER_SESSION > kafka.session_timeout:
        yield Contradiction(
            ("kafka.heartbeat_interval", "kafka.session_timeout"),
            f"kafka.heartbeat_interval ({show(kafka.heartbeat_interval)}) must be at most a third of "
            f"kafka.session_timeout ({show(kafka.session_timeout)}): two lost heartbeats must not cost the membership",
        )
    if commit.transaction_interval >= kafka.transaction_timeout:
        yield Contradiction(
            ("commit.transaction_interval", "kafka.transaction_timeout"),
            f"commit.transaction_interval ({show(commit.transaction_interval)}) must be below "
            f"kafka.transaction_timeout ({show(kafka.transaction_timeout)}): the broker aborts longer transactions",
        )
    if retry.initial > retry.max:
        yield Contradiction(
            ("retry.initial", "retry.max"),
            f"retry.initial ({show(retry.initial)}) must be at most retry.max ({show(retry.max)})",
        )


def _sizes(config: Config) -> Contradictions:
    limits, output, storage = config.limits, config.output, config.storage
    if limits.record_bytes > limits.in_flight_bytes:
        yield Contradiction(
            ("limits.record_bytes", "limits.in_flight_bytes"),
            f"limits.record_bytes ({format_size(limits.record_bytes)}) must be at most limits.in_flight_bytes "
            f"({format_size(limits.in_flight_bytes)}): such a record would never be read",
        )
    if limits.response_bytes + RESPONSE_OVERHEAD_BYTES > output.max_request_bytes:
        yield Contradiction(
            ("limits.response_bytes", "output.max_request_bytes"),
            f"limits.response_bytes ({format_size(limits.response_bytes)}) + {format_size(RESPONSE_OVERHEAD_BYTES)} "
            f"for key and headers must be at most output.max_request_bytes ({format_size(output.max_request_bytes)})",
        )
    cell = CELL_BYTES_MAX.get(storage.high_volume.type)
    if cell is not None and storage.threshold > cell:
        yield Contradiction(
            ("storage.threshold", "storage.high_volume.type"),
            f"storage.threshold ({format_size(storage.threshold)}) must be at most what one cell of "
            f"storage.high_volume.type {storage.high_volume.type} holds ({cell} bytes)",
        )


def _security(config: Config) -> Contradictions:
    kafka, registry = config.kafka, config.schema_registry
    if kafka.security_protocol == "SASL_PLAINTEXT" and not kafka.allow_insecure:
        yield Contradiction(
            ("kafka.security_protocol", "kafka.allow_insecure"),
            "kafka.security_protocol SASL_PLAINTEXT sends credentials unencrypted: "
            "use SASL_SSL, or set kafka.allow_insecure to true",
        )
    if kafka.security_protocol.startswith("SASL_"):
        needed: tuple[str, ...] = ("sasl_mechanism",)
        if kafka.sasl_mechanism is not None:
            needed = ("oauth",) if kafka.sasl_mechanism == "OAUTHBEARER" else ("sasl_username", "sasl_password")
        reason = "kafka.security_protocol" if kafka.sasl_mechanism is None else "kafka.sasl_mechanism"
        for name in needed:
            if getattr(kafka, name) is None:
                yield Contradiction(
                    (reason, f"kafka.{name}"),
                    f"kafka.{name} is required with {reason} {kafka.sasl_mechanism or kafka.security_protocol}",
                )
    for name in ("ssl_key_file", "ssl_key_password"):
        if getattr(kafka, name) is not None and kafka.ssl_cert_file is None:
            yield Contradiction(
                (f"kafka.{name}", "kafka.ssl_cert_file"),
                f"kafka.{name} needs kafka.ssl_cert_file: a key without its certificate proves nothing",
            )
    if (registry.username is None) != (registry.password is None):
        given, missing = ("username", "password") if registry.password is None else ("password", "username")
        yield Contradiction(
            (f"schema_registry.{given}", f"schema_registry.{missing}"),
            f"schema_registry.{given} needs schema_registry.{missing} beside it",
        )
    if registry.bearer_token is not None and registry.username is not None:
        yield Contradiction(
            ("schema_registry.bearer_token", "schema_registry.username"),
            "schema_registry.bearer_token and schema_registry.username exclude each other",
        )


def _combinations(config: Config) -> Contradictions:
    inputs, output, dead_letter = config.input.topics, config.output.topic, config.dead_letter.topic
    if output in inputs:
        yield Contradiction(
            ("output.topic", "input.topics"),
            f"output.topic {output} must not be one of input.topics: every response would be read as an operation",
        )
    if dead_letter is not None and dead_letter in inputs:
        yield Contradiction(
            ("dead_letter.topic", "input.topics"),
            f"dead_letter.topic {dead_letter} must not be one of input.topics: dead letters would come back for ever",
        )
    if dead_letter is not None and dead_letter == output:
        yield Contradiction(
            ("dead_letter.topic", "output.topic"),
            f"dead_letter.topic {dead_letter} must not be output.topic: readers of responses could not tell them apart",
        )
    for name, framing in (("input", config.input.framing), ("output", config.output.framing)):
        if framing == "confluent" and config.schema_registry.url is None:
            yield Contradiction(
                (f"{name}.framing", "schema_registry.url"),
                f"{name}.framing confluent needs schema_registry.url",
            )
    if config.references.in_responses == "always" and config.storage.long_term.type == "memory":
        yield Contradiction(
            ("references.in_responses", "storage.long_term.type"),
            "references.in_responses always needs storage.long_term.type filesystem or gcs: nobody else reads memory",
        )
    if config.handout_seconds == 0:
        yield Contradiction(
            ("references.retention", "references.in_responses"),
            "references.retention must be above 0 where references.in_responses gives references: they would lead to "
            "nothing",
        )
    if config.runtime.processes > 1:
        for part in ("high_volume", "long_term", "change_log"):
            if getattr(config.storage, part).type == "memory":
                yield Contradiction(
                    ("runtime.processes", f"storage.{part}.type"),
                    f"runtime.processes ({config.runtime.processes}) must be 1 with storage.{part}.type memory: "
                    "memory serves one process",
                )


# ------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, slots=True)
class _Setting:
    """A node of the tree of settings: a section with ``children``, or a setting without."""

    children: Mapping[str, _Setting] = field(default_factory=dict)
    nullable: bool = False
    any_name: _Setting | None = None
    """What stands under names that the user chooses (``usecases``)."""

    @property
    def is_section(self) -> bool:
        return bool(self.children) or self.any_name is not None

    def child(self, name: str) -> _Setting | None:
        return self.children.get(name) or self.any_name


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the section models in a type: one, the variants of a storage section, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in {Union, UnionType, Annotated, dict}:
        for part in get_args(annotation):
            yield from _models(part)


def _tree(models: Iterable[type[BaseModel]], *, nullable: bool = False) -> _Setting:
    children: dict[str, _Setting] = {}
    for model in models:
        for name, info in model.model_fields.items():
            empty = type(None) in get_args(info.annotation)
            sections = list(_models(info.annotation))
            below = _tree(sections, nullable=empty) if sections else _Setting(nullable=empty)
            children[name] = _Setting(any_name=below) if get_origin(info.annotation) is dict else below
    return _Setting(children, nullable)


_SETTINGS: Final = _tree([Config])


def _names(node: _Setting = _SETTINGS, path: SettingPath = ()) -> Iterator[str]:
    for name, child in node.children.items():
        yield ".".join((*path, name))
        yield from _names(child, (*path, name))


_ALL_NAMES: Final = tuple(_names())


def _did_you_mean(path: SettingPath, spell: Callable[[str], str] = str) -> str:
    """Suggest a setting for an unknown one: similar in its section, else similar anywhere, else nothing."""
    section, name = path[:-1], path[-1]
    node: _Setting | None = _SETTINGS
    for part in section:
        node = node.child(part) if node is not None else None
    beside = [".".join((*section, known)) for known in (node.children if node is not None else ())]
    near = difflib.get_close_matches(".".join(path), beside, n=1, cutoff=0.75)
    near = near or [known for known in _ALL_NAMES if known.rpartition(".")[2] == name][:1]
    near = near or difflib.get_close_matches(".".join(path), _ALL_NAMES, n=1, cutoff=0.6)
    return f"; did you mean {spell(near[0])}?" if near else ""


class _Sources:
    """Values from all sources, the stronger over the weaker, with where each comes from and what was wrong."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[SettingPath, str] = {}
        self.sections: dict[SettingPath, str] = {}
        """Where a section begins in the YAML: for what is missing in it."""
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def set(self, path: SettingPath, value: Any, origin: str) -> None:
        """Set one setting over what weaker sources said."""
        target = self.values
        for name in path[:-1]:
            if not isinstance(target.get(name), dict):
                target[name] = {}
            target = target[name]
        target[path[-1]] = value
        self.origins = {known: where for known, where in self.origins.items() if known[: len(path)] != path}
        self.origins[path] = origin

    def where(self, path: SettingPath) -> str:
        """Where a setting was written, or else what is in it, or the section it is missing from; empty if nowhere."""
        for known in (path, path[:-1]):
            if found := self.origins.get(known) or self.sections.get(known):
                return found
            below = [written for written in self.origins if known and written[: len(known)] == known]
            if below:  # of a storage section its type, which decides what is required
                return self.origins[max(below, key=lambda written: written[-1] == "type")]
        return ""

    def problem(self, where: str, text: str) -> None:
        """Remember a problem."""
        line = f"{where}: {text}" if where else text
        if line not in self.problems:
            self.problems.append(line)


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Config:
    """Read, merge and check the configuration.

    Args:
        path: The YAML file; None = the one named by ``TIERSTREAM_CONFIG``, else none.
        environ: The environment; None = that of the process.
        flags: Values from the command line by dotted name (``{"kafka.group_id": "g"}``); None values are left out.

    Raises:
        ConfigError: something is wrong; the text lists everything, one problem a line.
    """
    environ = os.environ if environ is None else environ
    sources = _Sources()
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    if path is not None:
        _read_yaml(path, sources)
    _read_secret_files(environ.get(SECRETS_VARIABLE), sources)
    _read_environment(environ, sources)
    for name, value in (flags or {}).items():
        if value is not None:
            sources.set(tuple(name.split(".")), value, "flag")
    config = _validated(sources)
    if sources.problems or config is None:
        raise ConfigError("\n".join(sources.problems))
    config._origins.update({".".join(path): where for path, where in sources.origins.items()})  # noqa: SLF001 - as below
    config._warnings = (*sources.warnings, *_oddities(config))  # noqa: SLF001 - made here, frozen elsewhere
    return config


def _oddities(config: Config) -> Iterator[str]:
    kafka = config.kafka
    if kafka.security_protocol in {"PLAINTEXT", "SASL_PLAINTEXT"}:
        yield f"kafka.security_protocol is {kafka.security_protocol}: traffic with the brokers is not encrypted"
    if kafka.security_protocol in {"PLAINTEXT", "SSL"} and (kafka.sasl_password or kafka.oauth or kafka.sasl_username):
        yield f"kafka.sasl_* is set and not used: kafka.security_protocol is {kafka.security_protocol}"
    if kafka.security_protocol in {"PLAINTEXT", "SASL_PLAINTEXT"} and (kafka.ssl_ca_file or kafka.ssl_cert_file):
        yield f"kafka.ssl_* is set and not used: kafka.security_protocol is {kafka.security_protocol}"


# YAML -----------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path, sources: _Sources) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        sources.problem(str(path), f"cannot be read: {error.strerror or type(error).__name__}")
        return
    except UnicodeDecodeError:
        sources.problem(str(path), "is not UTF-8 text")
        return
    loader = yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _read_node(root, _SETTINGS, (), path, loader, sources)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # Quoted parts are left out: what stands there may be a secret that was meant to be quoted.
        said = re.sub(r"'[^']{2,}'", "…", error.problem or error.context or "cannot be understood")
        sources.problem(f"{path}:{mark.line + 1}" if mark else str(path), f"is no YAML: {said}")
    except yaml.YAMLError as error:
        sources.problem(str(path), f"is no YAML: {getattr(error, 'reason', type(error).__name__)}")
    finally:
        loader.dispose()


def _read_node(
    node: yaml.Node, setting: _Setting, path: SettingPath, file: Path, loader: yaml.SafeLoader, sources: _Sources
) -> None:
    where = f"{file}:{node.start_mark.line + 1}"
    if not setting.is_section:
        sources.set(path, loader.construct_object(node, deep=True), where)
        return
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        if setting.nullable:
            sources.set(path, None, where)
        return  # a section whose settings are all commented out
    if not isinstance(node, yaml.MappingNode):
        name = ".".join(path) or "the file"
        sources.problem(where, f"{name} holds settings by name (`name: value` lines)")
        return
    if path:
        sources.sections[path] = where
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        where = f"{file}:{line}"
        if not isinstance(key, yaml.ScalarNode) or not isinstance(key.value, str):
            sources.problem(where, "the name of a setting is a plain text")
            continue
        name = key.value
        child = setting.child(name)
        if name in seen:
            sources.problem(where, f"{'.'.join((*path, name))} is set twice, first in line {seen[name]}")
        elif child is None:
            dotted = (*path, name)
            sources.problem(where, f"{'.'.join(dotted)} is not a setting{_did_you_mean(dotted)}")
        else:
            if setting.any_name is not None:  # it is there, also if nothing is set in it
                sources.set((*path, name), {}, where)
            _read_node(value, child, (*path, name), file, loader, sources)
        seen.setdefault(name, line)


# variables and files ---------------------------------------------------------------------------------------------

_SERVICE_LINK: Final = re.compile(
    r"TIERSTREAM_(?:[A-Z0-9_]+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes puts into the environment for services whose names begin with "tierstream"."""

_OTHER_VARIABLES: Final = re.compile(r"TIERSTREAM_(?:CONFIG|SECRETS_DIR|TEST_.*|REQUIRE_.*)")


def _resolve(name: str) -> tuple[SettingPath, _Setting | None]:
    """Follow ``KAFKA__GROUP_ID`` (any case) through the tree of settings."""
    node: _Setting | None = _SETTINGS
    path: SettingPath = ()
    for part in name.split(NESTING):
        if node is not None and node.any_name is not None:
            path, node = (*path, part), node.any_name
        else:
            path = (*path, part.lower())
            node = node.children.get(part.lower()) if node is not None else None
    return path, node


def _set_text(path: SettingPath, setting: _Setting, text: str, where: str, sources: _Sources) -> None:
    if setting.is_section:
        sources.problem(where, f"{'.'.join(path)} is a section: set one of its settings, {where}{NESTING}…")
    elif setting.nullable and text.strip().lower() in {"", "null"}:
        sources.set(path, None, where)
    else:
        sources.set(path, text, where)


def _variable(dotted: str) -> str:
    """Spell a setting as a variable; names that the user chooses keep their case."""
    node: _Setting | None = _SETTINGS
    parts: list[str] = []
    for part in dotted.split("."):
        chosen = node is not None and node.any_name is not None
        parts.append(part if chosen else part.upper())
        node = node.child(part) if node is not None else None
    return ENV_PREFIX + NESTING.join(parts)


def _read_environment(environ: Mapping[str, str], sources: _Sources) -> None:
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or _OTHER_VARIABLES.fullmatch(name):
            continue
        path, setting = _resolve(name.removeprefix(ENV_PREFIX))
        nested = NESTING in name
        if setting is not None and (nested or not setting.is_section):
            _set_text(path, setting, environ[name], name, sources)
        elif nested:
            sources.problem(name, f"is not a setting{_did_you_mean(path, _variable)}")
        elif not _SERVICE_LINK.fullmatch(name):
            sources.warnings.append(f"the variable {name} means nothing here{_did_you_mean(path, _variable)}")


def _read_secret_files(directory: str | None, sources: _Sources) -> None:
    folder = Path(directory) if directory else SECRETS_DIR
    try:
        files = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file())
    except OSError as error:
        if directory:
            sources.problem(SECRETS_VARIABLE, f"{folder} cannot be read: {error.strerror or type(error).__name__}")
        return
    for file in files:
        path, setting = _resolve(file.name)
        where = f"secret file {file}"
        if setting is None or (setting.is_section and NESTING not in file.name):
            suggestion = _did_you_mean(path, lambda dotted: dotted.replace(".", NESTING))
            if NESTING in file.name:
                sources.problem(where, f"is not a setting{suggestion}")
            else:
                sources.warnings.append(f"the {where} means nothing here{suggestion}")
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            sources.problem(where, f"cannot be read: {error.strerror or type(error).__name__}")
        except UnicodeDecodeError:
            sources.problem(where, "is not UTF-8 text")
        else:
            _set_text(path, setting, text.removesuffix("\n").removesuffix("\r"), where, sources)


# validation ------------------------------------------------------------------------------------------------------


def _validated(sources: _Sources) -> Config | None:
    """Validate the merged values and compare those that are right by themselves; problems go to *sources*."""
    wrong: set[SettingPath] = set()
    values = sources.values
    try:
        config = Config.model_validate(values)
    except ValidationError as failure:
        for error in failure.errors(include_url=False, include_input=True):
            path, index = _located(error)
            wrong.add(path)
            sources.problem(sources.where(path), f"{'.'.join(path)}{index} {_said(error)}")
        try:
            config = Config.model_validate(_without(values, wrong))
        except ValidationError:
            return None  # a section without something it requires: its neighbours' problems are told
    for broken in contradictions(config):
        paths = [tuple(name.split(".")) for name in broken.settings]
        if any(_overlap(path, bad) for path in paths for bad in wrong):
            continue
        written = [sources.origins[path] for path in paths if path in sources.origins]
        sources.problem(" and ".join(dict.fromkeys(written)), broken.text)
    return config


def _located(error: ErrorDetails) -> tuple[SettingPath, str]:
    """Turn pydantic's location into a setting, and the index in its list, as ``[0]``, where there is one.

    In a storage section pydantic puts the name of the variant in between, which is no setting.
    """
    path: list[str] = []
    for part in error["loc"]:
        if isinstance(part, int):
            return tuple(path), f"[{part}]"
        if part == "[key]":
            break
        variant = len(path) == 2 and path[0] == "storage" and len(error["loc"]) > 3 and error["loc"][2] is part
        if not variant:
            path.append(part)
    if error["type"] == "union_tag_invalid":
        path.append("type")
    return tuple(path), ""


def _said(error: ErrorDetails) -> str:
    """Say what is wrong, as the rest of a sentence that begins with the setting; never with the value of a secret."""
    match error["type"]:
        case "value_error":
            return str(error["ctx"]["error"])
        case "missing":
            return "is required"
        case "extra_forbidden":
            return "is not a setting here"
        case "literal_error" | "union_tag_invalid":
            return f"is one of {error['ctx'].get('expected') or error['ctx']['expected_tags']}"
        case "string_type" | "is_instance_of" if isinstance(error["input"], bool | int | float):
            return "is a text: put it in quotes"
        case "model_type" | "model_attributes_type":
            return "holds settings by name"
    return re.sub(r"^(Input|String|List|Dictionary|Value) ", "", error["msg"]).partition(", unable")[0]


def _without(values: Mapping[str, Any], wrong: Iterable[SettingPath]) -> dict[str, Any]:
    """Copy the nested *values* without the settings in *wrong*."""
    wrong = list(wrong)
    kept: dict[str, Any] = {}
    for name, value in values.items():
        below = [path[1:] for path in wrong if path[0] == name]
        if () in below:
            continue
        kept[name] = _without(value, below) if below and isinstance(value, Mapping) else value
    return kept


def _overlap(one: SettingPath, other: SettingPath) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]
