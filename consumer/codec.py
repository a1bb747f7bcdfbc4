"""Bytes to operations, outcomes to bytes: the Avro edge of the pipeline.

**Decoding** (:class:`OperationDecoder`) never raises; it gives a :class:`Decoded`. The first that applies:

1. No value: ``null_value``. More bytes than a record may have, or too many to be had at all
   (:class:`~consumer.operations.Unread`): ``payload_too_large``, and nothing is read.
2. *Framing* (contract 2.4) says which schema wrote the value and where its datum begins. Unknown id or fingerprint, or
   no registry to ask: ``unknown_schema``. Half a frame: ``decode_error``.
3. *The datum is read.* One of schema v1, as nearly every one is, by :class:`_Reader`: straight through the bytes, every
   length, index and string checked before it is used. One of another schema is first checked by a scanner of
   :mod:`consumer.prescan`, then read by fastavro into the fields of v1. Bytes missing or left over, bad UTF-8, a union
   index out of range, more items than allowed: ``decode_error``.
4. *The rules of contract 2.1*: ``invalid_operation``, ``invalid_metadata``. What breaks its own limit is not echoed.
5. *Usecase policy*: ``usecase_denied``. *Size* of an inline object: ``payload_too_large``.

1 to 4 are poison: the record never became an operation.

Producers repeat themselves, so the context and metadata last read are remembered with their bytes. Where a datum goes
on with exactly these bytes, reading them again would consume exactly them and give the same values.

**Encoding** (:class:`ResponseEncoder`) never raises either: a response that cannot be written is a ``panic``. It is
written by hand, part by part, byte for byte as fastavro would (a property test holds it to that).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal, Protocol, TypeAlias, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

import fastavro

from consumer.avro_schemas import (
    OPERATION_FINGERPRINT,
    RESPONSE_FINGERPRINT,
    Schema,
    operation_schema,
    response_schema,
)
from consumer.errors import (
    DecodeError,
    InvalidMetadata,
    InvalidOperation,
    OperationPanic,
    TierstreamError,
    TooLarge,
    UsecaseDenied,
)
from consumer.ids import SCOPES_MAX, STORAGE_PATH_BYTES_MAX, ObjectContext, Scope, check_key
from consumer.operations import (
    CONTENT_TYPE_DEFAULT,
    DEFAULT_METADATA,
    Delete,
    Deleted,
    Get,
    Got,
    Head,
    Headed,
    Insert,
    Inserted,
    Kind,
    Metadata,
    Operation,
    OpResponse,
    PayloadReference,
    Position,
    TimeToIdle,
    TimeToLive,
    Unread,
)
from consumer.prescan import ELEMENTS_MAX, Scanner, read_index, read_length, read_number, scanner

Framing: TypeAlias = Literal["auto", "bare", "single-object", "confluent"]
Headers: TypeAlias = Sequence[tuple[str, bytes | None]]

REQUEST_ID_BYTES_MAX = 1024
"""Longest request id in bytes of UTF-8 (contract 2.1)."""
ENVELOPE_BYTES_MAX = 3072
"""What a response to a get may have beside metadata and payload: request id (1,024), context and key (900 as a storage
path, and their length prefixes), topic (249), frame and numbers come to about 2,420."""

FAILURE_MESSAGE_MAX = 1000
"""Longest ``Failure.message`` in characters: an exception's text can be as long as what it complains about."""
_REQUEST_ID_SHORT = REQUEST_ID_BYTES_MAX // 4
CRC32C_MAX = 0xFFFF_FFFF

SCHEMA_ID_HEADER = "__value_schema_id"
"""Kafka header that names the schema of an unframed value: 01 and a GUID (contract 2.4)."""
OPERATION_PREFIX = b"\xc3\x01" + bytes.fromhex(OPERATION_FINGERPRINT)[::-1]
"""What stands before an operation in single-object framing."""
RESPONSE_PREFIX = b"\xc3\x01" + bytes.fromhex(RESPONSE_FINGERPRINT)[::-1]
"""What stands before a response in single-object framing."""

CONTEXTS_MAX = 4096
"""Contexts remembered by a decoder: about 2 MiB of short ones. When full it begins anew."""
REMEMBERED_BYTES_MAX = 1024
"""Longest context or metadata remembered; comparing longer ones with every record would cost more than it saves."""

_GENERATED_KEY_BYTES = 36
"""A generated key is a UUID."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_ENDS_EARLY = "the record ends too early"
_TOO_MANY_ITEMS = "the record has more items than allowed"
_UNKNOWN_SCHEMA = "the record's schema is not known"

_Found = TypeVar("_Found")


class UsecasePolicy(Protocol):
    """What one usecase may do (configuration ``usecases``)."""

    @property
    def enabled(self) -> bool:
        """False denies every operation."""
        ...

    @property
    def expirations(self) -> Collection[str]:
        """Expirations an insert may have: of ``none``, ``ttl``, ``tti``."""
        ...

    @property
    def max_seconds(self) -> int | None:
        """Longest expiration; None: no limit of its own."""
        ...

    @property
    def max_object_bytes(self) -> int | None:
        """Largest object; None: no limit of its own."""
        ...


class SchemaResolver(Protocol):
    """Knows writer schemas by the id in a frame."""

    def lookup(self, schema_id: str) -> Schema | None:
        """Return the schema, None if there is none of that id. Never waits: whoever feeds the decoder asked before.

        Args:
            schema_id: As :meth:`OperationDecoder.schema_id` gives it.

        Raises:
            DecodeError: ``unsafe_schema``.
        """
        ...


class Decoded:
    """What became of one record: either ``operation`` or ``error`` is there."""

    __slots__ = ("context", "context_bytes", "error", "key", "kind", "operation", "poison", "request_id", "schema_id")

    def __init__(
        self,
        operation: Operation | None,
        error: TierstreamError | None,
        request_id: str | None = None,
        context: ObjectContext | None = None,
        kind: Kind | None = None,
        key: str | None = None,
        *,
        poison: bool = False,
        schema_id: str | None = None,
        context_bytes: bytes | None = None,
    ) -> None:
        self.operation = operation
        self.error = error
        """Why there is no operation."""
        self.request_id = request_id
        """Echoed, as ``context``, ``kind`` and ``key`` are; None where it could not be read or breaks its limit."""
        self.context = context
        self.kind = kind
        self.key = key
        self.poison = poison
        """True where the record never became an operation (contract 2.2): it is dead-lettered."""
        self.schema_id = schema_id
        """Of a framed value: fingerprint in 16 hex digits, registry id in decimal, or GUID; else None."""
        self.context_bytes = context_bytes
        """``context`` as it stands in a response, made once per context."""

    def __repr__(self) -> str:
        what = repr(self.error) if self.operation is None else repr(self.operation)
        return f"Decoded({what}, poison={self.poison})"


# ------------------------------------------------------------------------------------------------------ reading


class _Context:
    """A context as read, with what is derived from it once. Without ``context`` there is an ``error``."""

    __slots__ = ("context", "elements", "encoded", "error", "policy", "prefix_bytes")

    def __init__(self, usecase: str, scopes: Sequence[tuple[str, str]], policies: Mapping[str, UsecasePolicy]) -> None:
        self.context: ObjectContext | None = None
        self.error: InvalidOperation | None = None
        self.encoded: bytes | None = None
        self.prefix_bytes = 0
        """Bytes of the storage path before the key; ASCII by the rules of a context."""
        self.elements = len(scopes)
        """Items it counts for against the element limit."""
        self.policy = policies.get(usecase)
        try:
            self.context = ObjectContext(usecase, [Scope(name, value) for name, value in scopes[: SCOPES_MAX + 1]])
        except InvalidOperation as error:
            self.error = error
        else:
            self.encoded = _context_bytes(self.context)
            self.prefix_bytes = len(self.context.storage_prefix)


class _Metadata:
    """Metadata as read. Without ``metadata`` there is an ``error``."""

    __slots__ = ("elements", "error", "metadata")

    def __init__(
        self,
        content_type: str = CONTENT_TYPE_DEFAULT,
        expiration: tuple[str, int] | None = None,
        compression: str | None = None,
        filename: str | None = None,
        origin: str | None = None,
        custom: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.metadata: Metadata | None = None
        self.error: InvalidMetadata | None = None
        self.elements = len(custom)
        """Items it counts for against the element limit."""
        try:
            metadata = Metadata(
                content_type, _expiration(expiration), compression, filename, origin, dict(custom) if custom else {}
            )
            metadata.validate()
        except InvalidMetadata as error:
            self.error = error
        else:
            self.metadata = DEFAULT_METADATA if metadata == DEFAULT_METADATA else metadata


def _expiration(expiration: tuple[str, int] | None) -> TimeToLive | TimeToIdle | None:
    if expiration is None:
        return None
    policy, seconds = expiration
    if policy == TimeToLive.policy:
        return TimeToLive(seconds)
    if policy == TimeToIdle.policy:
        return TimeToIdle(seconds)
    raise InvalidMetadata("an expiration policy is ttl or tti")


_Body: TypeAlias = tuple[Kind, str | None, _Metadata | None, bytes | PayloadReference]
_NO_PAYLOAD = b""
_KINDS: tuple[Kind, ...] = ("insert", "get", "delete", "head")
"""By their index in the union ``Operation.body``."""


def _sized(data: bytes, at: int) -> tuple[bytes, int]:
    """Read a length and that many bytes."""
    at, end = read_length(data, at)
    return data[at:end], end


def _text(data: bytes, at: int) -> tuple[str, int]:
    """Read a string."""
    size = data[at]
    if size < 128 and not size & 1 and (end := at + 1 + (size >> 1)) <= len(data):
        return data[at + 1 : end].decode(), end
    at, end = read_length(data, at)
    return data[at:end].decode(), end


def _optional(
    data: bytes, at: int, read: Callable[[bytes, int], tuple[_Found, int]]
) -> tuple[_Found | None, int]:
    """Read a union of null and what *read* reads."""
    index, at = read_index(data, at, 2)
    return read(data, at) if index else (None, at)


def _expiration_fields(data: bytes, at: int) -> tuple[tuple[str, int], int]:
    policy, at = _text(data, at)
    seconds, at = read_number(data, at)
    return (policy, seconds), at


def _reference(data: bytes, at: int) -> tuple[PayloadReference, int]:
    uri, at = _text(data, at)
    size, at = _optional(data, at, read_number)
    crc32c, at = _optional(data, at, read_number)
    return PayloadReference(uri, size, crc32c), at


def _pairs(data: bytes, at: int, elements_max: int) -> tuple[list[tuple[str, str]], int]:
    """Read blocks of pairs of strings: an array of scopes and a map of strings are the same on the wire."""
    pairs: list[tuple[str, str]] = []
    while True:
        count, at = read_number(data, at)
        if count == 0:
            return pairs, at
        block_end = None
        if count < 0:  # a block that says its size, so that a reader might skip it
            count = -count
            size, at = read_number(data, at)
            block_end = at + size
        if len(pairs) + count > elements_max:
            raise DecodeError(_TOO_MANY_ITEMS)
        if 2 * count > len(data) - at:
            raise DecodeError(_ENDS_EARLY)
        for _ in range(count):
            name, at = _text(data, at)
            value, at = _text(data, at)
            pairs.append((name, value))
        if block_end is not None and at != block_end:
            raise DecodeError("a block is not as long as it says")


class _Reader:
    """Reads data of schema v1; strict: what it accepts, every Avro reader reads the same."""

    def __init__(self, policies: Mapping[str, UsecasePolicy], elements_max: int) -> None:
        self._policies = policies
        self._elements_max = elements_max
        self._contexts: dict[tuple[str, tuple[tuple[str, str], ...]], _Context] = {}
        self._context = _Context("", (), policies)
        self._context_bytes = b"\x00\x00"
        self._metadata = _Metadata()
        self._metadata_bytes = _DEFAULT_METADATA_BYTES

    def read(self, data: bytes, at: int) -> tuple[_Context, str | None, _Body]:  # noqa: PLR0912 - the hot path
        """Read the datum that is all of *data* from *at* on.

        Raises:
            DecodeError: it is not one whole datum.
            IndexError: it ends too early.
            UnicodeDecodeError: a string is not UTF-8.
        """
        if data.startswith(self._context_bytes, at):
            context = self._context
            at += len(self._context_bytes)
        else:
            context, at = self._read_context(data, at)

        first = data[at]
        if first == 0:
            request_id = None
            at += 1
        elif first == 2:
            request_id, at = _text(data, at + 1)
        else:
            request_id, at = _optional(data, at, _text)

        # Nearly every index and short length is a single byte, which is read where it stands; all else by the book.
        body: _Body
        key: str | None
        payload: bytes | PayloadReference
        first = data[at]
        if first < 8 and not first & 1:
            index = first >> 1
            at += 1
        else:
            index, at = read_index(data, at, 4)
        if index == 0:
            if data[at] == 2:
                key, at = _text(data, at + 1)
            else:
                key, at = _optional(data, at, _text)
            if data.startswith(self._metadata_bytes, at):
                metadata = self._metadata
                at += len(self._metadata_bytes)
                if context.elements + metadata.elements > self._elements_max:
                    raise DecodeError(_TOO_MANY_ITEMS)
            else:
                metadata, at = self._read_metadata(data, at, self._elements_max - context.elements)
            if data[at] == 0:
                payload, at = _sized(data, at + 1)
            else:
                index, at = read_index(data, at, 2)
                payload, at = _reference(data, at) if index else _sized(data, at)
            body = "insert", key, metadata, payload
        else:
            key, at = _text(data, at)
            body = _KINDS[index], key, None, _NO_PAYLOAD
        if at != len(data):
            raise DecodeError("bytes are left over after the record")
        return context, request_id, body

    def _read_context(self, data: bytes, at: int) -> tuple[_Context, int]:
        """Read a context, and remember it."""
        start = at
        usecase, at = _text(data, at)
        scopes, at = _pairs(data, at, self._elements_max)
        context = self.context(usecase, scopes)
        if context.error is None and at - start <= REMEMBERED_BYTES_MAX:
            self._context = context
            self._context_bytes = data[start:at]
        return context, at

    def context(self, usecase: str, scopes: Sequence[tuple[str, str]]) -> _Context:
        """Return the context of these strings, the same object as last time where that can be."""
        name = usecase, tuple(scopes)
        context = self._contexts.get(name)
        if context is None:
            context = _Context(usecase, scopes, self._policies)
            if context.encoded is not None and len(context.encoded) <= REMEMBERED_BYTES_MAX:
                if len(self._contexts) >= CONTEXTS_MAX:
                    self._contexts.clear()
                self._contexts[name] = context
        return context

    def _read_metadata(self, data: bytes, at: int, elements_max: int) -> tuple[_Metadata, int]:
        """Read metadata of at most *elements_max* items, and remember it."""
        start = at
        content_type, at = _text(data, at)
        expiration, at = _optional(data, at, _expiration_fields)
        compression, at = _optional(data, at, _text)
        filename, at = _optional(data, at, _text)
        origin, at = _optional(data, at, _text)
        custom, at = _pairs(data, at, elements_max)
        for _ in range(3):  # time_created, time_expires, size: read-only, so whatever they hold is ignored
            _, at = _optional(data, at, read_number)
        metadata = _Metadata(content_type, expiration, compression, filename, origin, custom)
        if metadata.error is None and at - start <= REMEMBERED_BYTES_MAX:
            self._metadata = metadata
            self._metadata_bytes = data[start:at]
        return metadata, at


def _foreign_fields(
    fields: dict[str, Any], schema: Schema
) -> tuple[str, list[tuple[str, str]], str | None, _Body]:
    """Take apart a datum of *schema* that fastavro has read into the fields of v1; nested defaults may be missing."""
    context = fields["context"]
    scopes = [(scope["name"], scope["value"]) for scope in context["scopes"]]
    body = fields["body"]
    # A union of records comes with the name of its branch, a record that is always the same one does not.
    name, body = body if isinstance(body, tuple) else (_body_name(schema), body)
    kind: Kind = _KIND_BY_RECORD[name.rpartition(".")[2]]
    found: _Body
    if kind == "insert":
        payload = _branch_value(body["payload"])
        if isinstance(payload, dict):
            payload = PayloadReference(payload["uri"], payload["size"], payload["crc32c"])
        found = kind, body["key"], _foreign_metadata(body["metadata"]), payload
    else:
        found = kind, body["key"], None, _NO_PAYLOAD
    return context["usecase"], scopes, fields["request_id"], found


def _foreign_metadata(fields: dict[str, Any]) -> _Metadata:
    expiration = _branch_value(fields.get("expiration"))
    return _Metadata(
        fields.get("content_type", CONTENT_TYPE_DEFAULT),
        None if expiration is None else (expiration["policy"], expiration["seconds"]),
        fields.get("compression"),
        fields.get("filename"),
        fields.get("origin"),
        list(fields.get("custom", {}).items()),
    )


def _body_name(schema: Schema) -> str:
    """Return the full name of the record that is the body of every operation of *schema*."""
    (body,) = [part["type"] for part in schema.parsed["fields"] if part["name"] == "body"]
    name: str = body if isinstance(body, str) else body["name"]
    return name


def _branch_value(value: Any) -> Any:
    """Return the value of a union's branch without the branch's name."""
    return value[1] if isinstance(value, tuple) else value


_KIND_BY_RECORD: dict[str, Kind] = {kind.capitalize(): kind for kind in _KINDS}


class OperationDecoder:
    """Decodes records. One serves any number of partitions, on one thread.

    Args:
        framing: How values are framed (contract 2.4); ``auto`` tells it from each value.
        record_bytes_max: Bytes a record's value may have; one with more is not read.
        object_bytes_max: Bytes an inline payload may have.
        elements_max: Array items and map pairs a record may have in all.
        usecases: Policies by name of the usecase; one without a policy may do everything.
        resolver: Knows the schemas named by frames; None knows only v1, by its fingerprint.
    """

    def __init__(
        self,
        *,
        framing: Framing = "auto",
        record_bytes_max: int = 8 * 1024 * 1024,
        object_bytes_max: int = 1024 * 1024 * 1024,
        elements_max: int = ELEMENTS_MAX,
        usecases: Mapping[str, UsecasePolicy] | None = None,
        resolver: SchemaResolver | None = None,
    ) -> None:
        self._framing = framing
        self._record_bytes_max = record_bytes_max
        self._object_bytes_max = object_bytes_max
        self._elements_max = elements_max
        self._resolver = resolver
        self._reader = _Reader(usecases or {}, elements_max)
        self._scanners: WeakKeyDictionary[Schema, Scanner] = WeakKeyDictionary()
        """Of foreign schemas, for as long as the resolver keeps them."""

    def decode(self, value: bytes | None, headers: Headers = (), position: Position | None = None) -> Decoded:
        """Decode one record's *value*; never raises. A write says that it comes from *position*."""
        if value is None:
            return Decoded(None, DecodeError("the record has no value", code="null_value"), poison=True)
        if not value and isinstance(value, Unread):
            return Decoded(None, TooLarge(value.reason), poison=True)
        if len(value) > self._record_bytes_max:
            too_large = TooLarge(f"the record has more than {self._record_bytes_max} bytes")
            return Decoded(None, too_large, poison=True)
        schema_id = None
        try:
            schema_id, at = self._frame(value, headers)
            if schema_id is None or schema_id == OPERATION_FINGERPRINT:
                context, request_id, body = self._reader.read(value, at)
            else:
                context, request_id, body = self._read_framed(schema_id, value, at)
        except DecodeError as error:
            # Kept beyond this frame, which its traceback holds, and that the record: a circle, which only the garbage
            # collector would break, some thousand records later.
            failed = error.with_traceback(None)
            failed.__context__ = failed.__cause__ = None
        except IndexError:
            failed = DecodeError(_ENDS_EARLY)
        except UnicodeDecodeError:
            failed = DecodeError("a string is not UTF-8")
        except Exception as error:  # noqa: BLE001 - memory and recursion limits, and whatever a schema makes fastavro do
            failed = DecodeError(f"the record cannot be read: {type(error).__name__}")
        else:
            return self._checked(context, request_id, body, schema_id, position)
        return Decoded(None, failed, poison=True, schema_id=schema_id)

    def schema_id(self, value: bytes | None, headers: Headers = ()) -> str | None:
        """Return the id in the frame of *value*: 16 hex digits, a decimal number, or a GUID.

        None without a frame, and where :meth:`decode` would not get as far as to ask for a schema.
        """
        if value is None or len(value) > self._record_bytes_max:
            return None
        try:
            return self._frame(value, headers)[0]
        except DecodeError:
            return None

    def _frame(self, value: bytes, headers: Headers) -> tuple[str | None, int]:
        """Return the schema id in the frame, if there is one, and where the datum begins.

        Raises:
            DecodeError: the frame is not whole, or not the one configured.
        """
        framing = self._framing
        if framing == "bare":
            return None, 0
        if headers and framing != "single-object":
            # Of several headers of one name Kafka's clients read the last.
            for name, guid in reversed(headers):
                if name == SCHEMA_ID_HEADER:
                    if guid is None or len(guid) != 17 or guid[0] != 1:
                        raise DecodeError(f"header {SCHEMA_ID_HEADER} is not 01 and a GUID")
                    return str(UUID(bytes=guid[1:])), 0
        first = value[:1]
        if framing != "confluent" and first == b"\xc3":
            if len(value) >= 10 and value[1] == 1:
                return value[9:1:-1].hex(), 10
            if value == b"\xc3" or value[1] == 1:
                raise DecodeError("a single-object frame is not whole")
        elif framing != "single-object" and first <= b"\x01" and first:
            if first == b"\x00" and len(value) >= 5:
                return str(int.from_bytes(value[1:5])), 5
            if first == b"\x01" and len(value) >= 17:
                return str(UUID(bytes=value[1:17])), 17
            raise DecodeError("a registry frame is not whole")
        if framing != "auto":
            raise DecodeError(f"the record is not in {framing} framing")
        return None, 0

    def _read_framed(self, schema_id: str, value: bytes, at: int) -> tuple[_Context, str | None, _Body]:
        """Read a datum of another schema than v1, or of v1 under another id."""
        schema = None if self._resolver is None else self._resolver.lookup(schema_id)
        if schema is None:
            raise DecodeError(_UNKNOWN_SCHEMA, code="unknown_schema")
        if schema.fingerprint == OPERATION_FINGERPRINT:
            return self._reader.read(value, at)
        scan = self._scanners.get(schema)
        if scan is None:
            scan = self._scanners[schema] = scanner(schema.tree, elements_max=self._elements_max)
        scan(value, at)
        fields = fastavro.schemaless_reader(
            io.BytesIO(value[at:]), schema.parsed, operation_schema().parsed, return_record_name=True
        )
        usecase, scopes, request_id, body = _foreign_fields(fields, schema)  # type: ignore[arg-type] # a record
        return self._reader.context(usecase, scopes), request_id, body

    def _checked(
        self,
        context: _Context,
        request_id: str | None,
        body: _Body,
        schema_id: str | None,
        position: Position | None,
    ) -> Decoded:
        """Hold what was read against the rules; what breaks one is not echoed."""
        kind, key, metadata, payload = body
        error: TierstreamError | None = context.error
        # A character has at most four bytes: a short id need not be encoded to know that it is short enough.
        if request_id and len(request_id) > _REQUEST_ID_SHORT and len(request_id.encode()) > REQUEST_ID_BYTES_MAX:
            error = error or InvalidOperation(f"a request id has at most {REQUEST_ID_BYTES_MAX} bytes of UTF-8")
            request_id = None
        broken = _key_error(key, context.prefix_bytes)
        if broken is not None:
            error = error or broken
            key = None
        if metadata is None:
            poison = error is not None
        else:
            error = error or _reference_error(payload) or metadata.error
            poison = error is not None
            if error is None and isinstance(payload, bytes) and len(payload) > self._object_bytes_max:
                error = TooLarge(f"the object has more than {self._object_bytes_max} bytes")
        if context.policy is not None and not poison:
            error = _policy_error(context.policy, metadata, payload) or error
        operation: Operation | None = None
        if error is None and context.context is not None:
            if metadata is not None and metadata.metadata is not None:
                operation = Insert(context.context, key, metadata.metadata, payload, position)
            elif key is not None:
                if kind == "delete":
                    operation = Delete(context.context, key, position)
                else:
                    operation = (Get if kind == "get" else Head)(context.context, key)
        return Decoded(
            operation,
            error,
            request_id,
            context.context,
            kind,
            key,
            poison=poison,
            schema_id=schema_id,
            context_bytes=context.encoded,
        )


def _key_error(key: str | None, prefix_bytes: int) -> InvalidOperation | None:
    """Return what is wrong with an object key, None stands for one yet to be generated."""
    if key is None:
        size = _GENERATED_KEY_BYTES
    elif key.isascii() and key.isprintable() and key:
        size = len(key)
    else:
        try:
            check_key(key)
        except InvalidOperation as error:
            return error
        size = len(key.encode())
    if prefix_bytes + size > STORAGE_PATH_BYTES_MAX:
        return InvalidOperation(f"a storage path has at most {STORAGE_PATH_BYTES_MAX} bytes of UTF-8")
    return None


def _reference_error(payload: bytes | PayloadReference) -> InvalidOperation | None:
    if isinstance(payload, bytes):
        return None
    if payload.size is not None and payload.size < 0:
        return InvalidOperation("the size of a payload reference is not negative")
    if payload.crc32c is not None and not 0 <= payload.crc32c <= CRC32C_MAX:
        return InvalidOperation(f"the crc32c of a payload reference is 0 to {CRC32C_MAX}")
    return None


def _policy_error(
    policy: UsecasePolicy, metadata: _Metadata | None, payload: bytes | PayloadReference
) -> UsecaseDenied | None:
    """Return why *policy* forbids the operation; *metadata* is None for all but inserts.

    The size of a reference is its claim; whoever reads it holds the claim against the bytes.
    """
    if not policy.enabled:
        return UsecaseDenied("the usecase is disabled")
    if metadata is None or metadata.metadata is None:
        return None
    expiration = metadata.metadata.expiration
    if ("none" if expiration is None else expiration.policy) not in policy.expirations:
        return UsecaseDenied("the usecase does not allow this expiration")
    if expiration is not None and policy.max_seconds is not None and expiration.seconds > policy.max_seconds:
        return UsecaseDenied(f"the usecase allows expirations up to {policy.max_seconds} seconds")
    size = len(payload) if isinstance(payload, bytes) else payload.size
    if size is not None and policy.max_object_bytes is not None and size > policy.max_object_bytes:
        return UsecaseDenied(f"the usecase allows objects up to {policy.max_object_bytes} bytes")
    return None


# ------------------------------------------------------------------------------------------------------ writing


def _number(value: int) -> bytes:
    """Write a zigzag number."""
    rest = (value << 1) ^ (value >> 63)
    if rest < 128:
        return _BYTES[rest]
    if _EIGHT_BYTES_MIN <= rest < _NINE_BYTES_MIN:  # a time in microseconds, from 1988 to 3111
        return bytes(
            (
                rest & 127 | 128,
                rest >> 7 & 127 | 128,
                rest >> 14 & 127 | 128,
                rest >> 21 & 127 | 128,
                rest >> 28 & 127 | 128,
                rest >> 35 & 127 | 128,
                rest >> 42 & 127 | 128,
                rest >> 49,
            )
        )
    if rest < 1 << 14:  # sizes and offsets: written out, as a loop costs three times as much
        return bytes((rest & 127 | 128, rest >> 7))
    if rest < 1 << 21:
        return bytes((rest & 127 | 128, rest >> 7 & 127 | 128, rest >> 14))
    if rest < 1 << 28:
        return bytes((rest & 127 | 128, rest >> 7 & 127 | 128, rest >> 14 & 127 | 128, rest >> 21))
    written = bytearray()
    while rest > 127:
        written.append(rest & 127 | 128)
        rest >>= 7
    written.append(rest)
    return bytes(written)


_BYTES = [bytes([value]) for value in range(128)]
_EIGHT_BYTES_MIN = 1 << 49
_NINE_BYTES_MIN = 1 << 56


def _string(text: str) -> bytes:
    """Write a string."""
    raw = text.encode()
    size = len(raw)
    return (_BYTES[size << 1] if size < 64 else _number(size)) + raw


def _optional_string(text: str | None) -> bytes:
    return b"\x00" if text is None else b"\x02" + _string(text)


def _optional_number(value: int | None) -> bytes:
    return b"\x00" if value is None else b"\x02" + _number(value)


def _micros(moment: datetime) -> int:
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _pairs_bytes(pairs: Collection[tuple[str, str]]) -> bytes:
    """Write pairs of strings as one block: an array of scopes, or a map."""
    if not pairs:
        return b"\x00"
    return _number(len(pairs)) + b"".join([_string(name) + _string(value) for name, value in pairs]) + b"\x00"


def _context_bytes(context: ObjectContext) -> bytes:
    return _string(context.usecase) + _pairs_bytes([(scope.name, scope.value) for scope in context.scopes])


def _metadata_bytes(metadata: Metadata) -> bytes:
    created, expires, size = metadata.time_created, metadata.time_expires, metadata.size
    return b"%b%b%b%b" % (
        _described_bytes(metadata),
        b"\x00" if created is None else b"\x02" + _number(_micros(created)),
        b"\x00" if expires is None else b"\x02" + _number(_micros(expires)),
        b"\x00" if size is None else b"\x02" + _number(size),
    )


def _described_bytes(metadata: Metadata) -> bytes:
    """Write what the caller says of an object: all but the read-only fields."""
    content_type, custom, expiration = metadata.content_type, metadata.custom, metadata.expiration
    compression, filename, origin = metadata.compression, metadata.filename, metadata.origin
    if (
        content_type == CONTENT_TYPE_DEFAULT
        and expiration is None
        and compression is None
        and filename is None
        and origin is None
        and not custom
    ):
        return _NOTHING_DESCRIBED
    return (
        _string(content_type)
        + (b"\x00" if expiration is None else b"\x02" + _string(expiration.policy) + _number(expiration.seconds))
        + _optional_string(compression)
        + _optional_string(filename)
        + _optional_string(origin)
        + (_pairs_bytes(custom.items()) if custom else b"\x00")
    )


def _payload_parts(payload: bytes | PayloadReference) -> tuple[bytes, bytes]:
    """Write a payload as two parts, so that its bytes are copied only once, when all parts are joined."""
    if isinstance(payload, PayloadReference):
        reference = _string(payload.uri) + _optional_number(payload.size) + _optional_number(payload.crc32c)
        return b"\x02", reference
    return b"\x00" + _number(len(payload)), payload


def got_bytes_max(metadata: Metadata) -> int:
    """Return the most a response to a get may have, payload included, where the metadata is *metadata* (pure).

    Exact for the metadata; :data:`ENVELOPE_BYTES_MAX` for everything else.
    """
    return ENVELOPE_BYTES_MAX + len(_metadata_bytes(metadata)) + (metadata.size or 0)


_NOTHING_DESCRIBED = _string(CONTENT_TYPE_DEFAULT) + b"\x00\x00\x00\x00\x00"
"""Metadata that says nothing: the default content type, and four fields and a map that are empty."""
_DEFAULT_METADATA_BYTES = _metadata_bytes(DEFAULT_METADATA)


def encode_operation(operation: Operation, request_id: str | None = None) -> bytes:
    """Write *operation* as one bare datum.

    Raises:
        UnicodeEncodeError: a string has a lone surrogate.
    """
    head = _context_bytes(operation.context) + _optional_string(request_id)
    if isinstance(operation, Insert):
        metadata = _metadata_bytes(operation.metadata)
        return b"".join(
            (head, b"\x00", _optional_string(operation.key), metadata, *_payload_parts(operation.payload))
        )
    return head + _number(_KINDS.index(operation.kind)) + _string(operation.key)


_NULL_ECHO = Decoded(None, None)
_KIND_BYTES: dict[Kind | None, bytes] = {None: b"\x00"} | {kind: _optional_string(kind) for kind in _KINDS}

# Status and branch of ``result``, and where there is one the branch inside it.
_INSERTED = _number(201) + b"\x00"
_GOT = _number(200) + b"\x02\x02"
_NOT_GOT = _number(404) + b"\x02\x00"
_HEADED = _number(204) + b"\x04\x02"
_NOT_HEADED = _number(404) + b"\x04\x00"
_DELETED = _number(204) + b"\x06"


def registry_prefix(schema_id: int) -> bytes:
    """Return what stands before a datum of the schema with this id, 0 to 2**32 - 1, in a registry's framing."""
    return b"\x00" + schema_id.to_bytes(4)


class ResponseEncoder:
    """Encodes the responses to one input partition.

    Args:
        topic: The input topic.
        partition: The input partition.
        prefix: What every response begins with: nothing (bare), ``RESPONSE_PREFIX`` (single-object), or what
            :func:`registry_prefix` returns (confluent).
    """

    def __init__(self, topic: str, partition: int, *, prefix: bytes = b"") -> None:
        self._prefix = prefix
        self._source = _string(topic) + _number(partition)

    def encode(
        self, offset: int, decoded: Decoded, outcome: OpResponse | Exception, completed_at_us: int
    ) -> tuple[int, bytes]:
        """Return status and bytes of a response; never raises.

        Args:
            offset: Of the input record; the response's index.
            decoded: What became of the record: echoed.
            outcome: What became of the operation; an exception that is not ours is a ``panic``.
            completed_at_us: When, in microseconds since the epoch.
        """
        try:
            return self._encode(offset, decoded, outcome, completed_at_us)
        except Exception as error:  # noqa: BLE001 - whatever storage gave back, the record gets its response
            panic = OperationPanic(f"the response cannot be written: {type(error).__name__}")
            return self._encode(offset, _NULL_ECHO, panic, completed_at_us)

    def _encode(
        self, offset: int, decoded: Decoded, outcome: OpResponse | Exception, completed_at_us: int
    ) -> tuple[int, bytes]:
        number = _number(offset)
        context = decoded.context_bytes
        if context is not None:
            echo = b"\x02" + context
        else:
            echo = b"\x00" if decoded.context is None else b"\x02" + _context_bytes(decoded.context)
        request_id = decoded.request_id
        payload = b""
        if isinstance(outcome, Inserted):
            key: str | None = outcome.id.key
            status = 201
            result = _INSERTED + _metadata_bytes(outcome.metadata)
        elif isinstance(outcome, Exception):
            key = decoded.key
            status, result = _failure(outcome)
        else:
            key = outcome.key
            status, result, payload = _read_result(outcome)
        return status, b"".join(
            (
                self._prefix,
                number,
                self._source,
                number,
                b"\x00" if request_id is None else b"\x02" + _string(request_id),
                echo,
                _KIND_BYTES[decoded.kind],
                b"\x00" if key is None else b"\x02" + _string(key),
                result,
                payload,
                _number(completed_at_us),
            )
        )


def _read_result(outcome: Got | Headed | Deleted) -> tuple[int, bytes, bytes]:
    """Return status, status and result as written, and a payload that follows them."""
    if isinstance(outcome, Got):
        if outcome.object is None:
            return 404, _NOT_GOT, b""
        size, payload = _payload_parts(outcome.object.payload)
        return 200, _GOT + _metadata_bytes(outcome.object.metadata) + size, payload
    if isinstance(outcome, Headed):
        if outcome.metadata is None:
            return 404, _NOT_HEADED, b""
        return 204, _HEADED + _metadata_bytes(outcome.metadata), b""
    return 204, _DELETED, b""


def _failure(error: Exception) -> tuple[int, bytes]:
    failure = error if isinstance(error, TierstreamError) else OperationPanic.from_exception(error)
    status = failure.status
    message = failure_message(failure).encode()
    retriable = b"\x01" if failure.retriable else b"\x00"
    return status, b"".join(
        (_number(status), b"\x08", _string(failure.code), _number(len(message)), message, retriable)
    )


def failure_message(error: TierstreamError) -> str:
    """Return what a response or dead letter says of *error*: 1 to 1,000 characters of valid Unicode."""
    message = str(error)[:FAILURE_MESSAGE_MAX] or error.code
    return message if message.isascii() else message.encode(errors="replace").decode()


# ------------------------------------------------------------------------------------------------------ for tools


@cache
def _response_scanner() -> Scanner:
    return scanner(response_schema().tree)


def decode_response(value: bytes) -> dict[str, Any]:
    """Read one response, bare or in a single-object frame.

    Returns:
        The fields of contract 2.2 by name; ``result`` has the name of its branch as ``type``; times are microseconds,
        payloads bytes or the fields of a reference.

    Raises:
        DecodeError: it is none.
    """
    at = len(RESPONSE_PREFIX) if value.startswith(RESPONSE_PREFIX) else 0
    _response_scanner()(value, at)
    response: Any = fastavro.schemaless_reader(
        io.BytesIO(value[at:]),
        response_schema().parsed,
        None,
        return_record_name=True,
        return_record_name_override=True,  # only where a union has several records: ``result``, and no other
    )
    name, result = response["result"]
    response["result"] = {"type": name.rpartition(".")[2], **result}
    return dict(response)


def operation_fields(operation: Operation, request_id: str | None = None) -> dict[str, Any]:
    """Return *operation* as the fields of contract 2.1 by name; ``body`` has the name of its branch as ``type``."""
    body: dict[str, Any] = {"type": operation.kind.capitalize(), "key": operation.key}
    if isinstance(operation, Insert):
        payload = operation.payload
        body["metadata"] = metadata_fields(operation.metadata)
        body["payload"] = (
            payload
            if isinstance(payload, bytes)
            else {"uri": payload.uri, "size": payload.size, "crc32c": payload.crc32c}
        )
    scopes = [{"name": scope.name, "value": scope.value} for scope in operation.context.scopes]
    return {"context": {"usecase": operation.context.usecase, "scopes": scopes}, "request_id": request_id, "body": body}


def metadata_fields(metadata: Metadata) -> dict[str, Any]:
    """Return *metadata* as the fields of contract 2.1 by name; times are microseconds."""
    expiration, created, expires = metadata.expiration, metadata.time_created, metadata.time_expires
    return {
        "content_type": metadata.content_type,
        "expiration": None if expiration is None else {"policy": expiration.policy, "seconds": expiration.seconds},
        "compression": metadata.compression,
        "filename": metadata.filename,
        "origin": metadata.origin,
        "custom": dict(metadata.custom),
        "time_created": None if created is None else _micros(created),
        "time_expires": None if expires is None else _micros(expires),
        "size": metadata.size,
    }
