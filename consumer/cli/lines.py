"""JSON lines: operations as people write them for ``produce``, records as ``tail`` shows them (contract 7).

A line is one object. ``kind`` and ``usecase`` are required, and ``key`` unless it is an insert; an insert needs exactly
one of ``payload`` (text), ``payload_base64``, ``payload_file`` (relative to the working directory) and
``payload_reference`` (an address, or ``{"uri", "size", "crc32c"}``). ``record_key`` is the key of the Kafka record: by
default the storage path, so that operations on one object keep their order; null where there is no key.

What a line says is checked here by the rules of contract 2.1, so that a slip does not end up as a dead letter.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from consumer.codec import CRC32C_MAX, REQUEST_ID_BYTES_MAX, encode_operation
from consumer.config import parse_duration
from consumer.errors import TierstreamError
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.kafka.tools import Outgoing
from consumer.operations import (
    CONTENT_TYPE_DEFAULT,
    Delete,
    Expiration,
    Get,
    Head,
    Insert,
    Metadata,
    Operation,
    PayloadReference,
    TimeToIdle,
    TimeToLive,
)

PAYLOADS: Final = ("payload", "payload_base64", "payload_file", "payload_reference")
_METADATA: Final = ("content_type", "ttl", "tti", "compression", "filename", "origin", "custom")
_EVERYWHERE: Final = ("kind", "usecase", "scopes", "key", "request_id", "record_key", "partition")
_READERS: Final[Mapping[str, type[Get | Delete | Head]]] = {"get": Get, "delete": Delete, "head": Head}


class BadLine(ValueError):
    """The line is no operation; the text says why."""


def read_line(line: bytes | str, *, payload_bytes_max: int) -> Outgoing:
    """Turn one JSON line into a record.

    Args:
        line: The line, with or without its end.
        payload_bytes_max: Largest payload that is read from a file.

    Raises:
        BadLine: it is no operation.
    """
    try:
        said = json.loads(line)
    except UnicodeDecodeError:
        raise BadLine("it is not UTF-8") from None
    except ValueError as error:
        raise BadLine(f"it is no JSON: {error}") from None
    except RecursionError:
        raise BadLine("it is nested too deep") from None
    if not isinstance(said, dict):
        raise BadLine("it is no JSON object")
    try:
        return _record(said, payload_bytes_max)
    except TierstreamError as error:
        raise BadLine(str(error)) from None
    except UnicodeEncodeError:
        raise BadLine("a text has a lone surrogate") from None


def _record(said: Mapping[str, Any], payload_bytes_max: int) -> Outgoing:
    kind = _required(said, "kind")
    if kind != "insert" and kind not in _READERS:
        raise BadLine(f"kind is insert, get, delete or head, not {kind}")
    _check_names(said, kind)
    context = ObjectContext(_required(said, "usecase"), _scopes(said.get("scopes", [])))
    key = _text(said, "key") if kind == "insert" else _required(said, "key")
    identity = None if key is None else ObjectId(context, key)  # checks both
    operation: Operation
    if kind == "insert":
        metadata = _metadata(said)
        metadata.validate()
        operation = Insert(context, key, metadata, _payload(said, payload_bytes_max))
    else:
        assert key is not None
        operation = _READERS[kind](context, key)
    request_id = _text(said, "request_id")
    if request_id is not None and len(request_id.encode()) > REQUEST_ID_BYTES_MAX:
        raise BadLine(f"request_id has at most {REQUEST_ID_BYTES_MAX} bytes of UTF-8")
    record_key = None if identity is None else identity.storage_path
    if "record_key" in said:
        record_key = _text(said, "record_key")
    return Outgoing(
        encode_operation(operation, request_id),
        None if record_key is None else record_key.encode(),
        _number(said, "partition", 2**31 - 1),
    )


def _check_names(said: Mapping[str, Any], kind: str) -> None:
    known = (*_EVERYWHERE, *PAYLOADS, *_METADATA) if kind == "insert" else _EVERYWHERE
    for name in said:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise BadLine(f"{name} means nothing in {kind}" + (f"; did you mean {near[0]}?" if near else ""))


def _text(said: Mapping[str, Any], name: str) -> str | None:
    value = said.get(name)
    if value is not None and not isinstance(value, str):
        raise BadLine(f"{name} is a text")
    return value


def _required(said: Mapping[str, Any], name: str) -> str:
    value = _text(said, name)
    if value is None:
        raise BadLine(f"{name} is required")
    return value


def _number(said: Mapping[str, Any], name: str, most: int) -> int | None:
    value = said.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise BadLine(f"{name} is a whole number from 0 to {most}")
    return value


def _scopes(said: Any) -> list[Scope]:
    scopes: list[Scope] = []
    for entry in said if isinstance(said, list) else [None]:
        if isinstance(entry, Mapping) and entry.keys() == {"name", "value"}:
            pair: Sequence[Any] = [entry["name"], entry["value"]]
        else:
            pair = entry if isinstance(entry, list) else []
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadLine('scopes is a list of pairs of texts such as [["org", "1"]]')
        scopes.append(Scope(*pair))
    return scopes


def _metadata(said: Mapping[str, Any]) -> Metadata:
    custom = said.get("custom")
    custom = {} if custom is None else custom
    if not isinstance(custom, dict) or not all(isinstance(value, str) for value in custom.values()):
        raise BadLine("custom is an object of texts")
    return Metadata(
        content_type=_text(said, "content_type") or CONTENT_TYPE_DEFAULT,
        expiration=_expiration(said),
        compression=_text(said, "compression"),
        filename=_text(said, "filename"),
        origin=_text(said, "origin"),
        custom=custom,
    )


def _expiration(said: Mapping[str, Any]) -> Expiration | None:
    given = [name for name in ("ttl", "tti") if said.get(name) is not None]
    if len(given) > 1:
        raise BadLine("ttl and tti exclude each other")
    if not given:
        return None
    try:
        seconds = parse_duration(said[given[0]])
    except ValueError as error:
        raise BadLine(f"{given[0]} {error}") from None
    if seconds != int(seconds):
        raise BadLine(f"{given[0]} is a whole number of seconds")
    return TimeToLive(int(seconds)) if given[0] == "ttl" else TimeToIdle(int(seconds))


def _payload(said: Mapping[str, Any], bytes_max: int) -> bytes | PayloadReference:
    given = [name for name in PAYLOADS if said.get(name) is not None]
    if len(given) != 1:
        raise BadLine(f"an insert has one of {', '.join(PAYLOADS)}" + (f", not {' and '.join(given)}" if given else ""))
    (name,) = given
    if name == "payload_reference":
        return _reference(said[name])
    text = _required(said, name)
    match name:
        case "payload_base64":
            try:
                return base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise BadLine("payload_base64 is no base64") from None
        case "payload_file":
            return _file(Path(text), bytes_max)
    return text.encode()


def _file(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            payload = file.read(bytes_max + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such file"
        raise BadLine(f"payload_file {path} cannot be read: {reason}") from None
    if len(payload) > bytes_max:
        raise BadLine(f"payload_file {path} has more than {bytes_max} bytes; give it by payload_reference")
    return payload


def _reference(said: Any) -> PayloadReference:
    if isinstance(said, str):
        said = {"uri": said}
    if not isinstance(said, dict) or not said.keys() <= {"uri", "size", "crc32c"} or "uri" not in said:
        raise BadLine("payload_reference is an address, or an object of uri, size and crc32c")
    size, crc32c = _number(said, "size", 2**63 - 1), _number(said, "crc32c", CRC32C_MAX)
    return PayloadReference(_required(said, "uri"), size, crc32c)


def synthetic(count: int) -> list[str]:
    """Return *count* lines of small inserts, each of an object of its own."""
    width = len(str(count))
    return [
        json.dumps({"kind": "insert", "usecase": "synthetic", "key": f"object-{number:0{width}}", "payload": "x" * 100})
        for number in range(1, count + 1)
    ]


def shown(value: Any) -> Any:
    """Turn decoded fields into what JSON can hold: bytes under ``NAME`` become base64 under ``NAME_base64``."""
    if isinstance(value, Mapping):
        fields: dict[str, Any] = {}
        for name, member in value.items():
            if isinstance(member, bytes):
                fields[f"{name}_base64"] = base64.b64encode(member).decode()
            else:
                fields[name] = shown(member)
        return fields
    if isinstance(value, list | tuple):
        return [shown(member) for member in value]
    return value


def header_pairs(headers: Sequence[tuple[str, bytes | None]]) -> list[list[str | None]]:
    """Return headers as pairs of texts; what is not UTF-8 shows replacement characters."""
    return [[name, None if value is None else value.decode(errors="replace")] for name, value in headers]
