"""Writer schemas by id, from a Confluent-compatible schema registry.

:meth:`SchemaRegistry.ensure` is awaited before a record with an id not heard of yet is decoded;
:meth:`SchemaRegistry.lookup` then answers the decoder without waiting. Asking for an id:

1. *One at a time.* Whoever comes while an id is being asked for waits for that answer.
2. *Ask* ``/schemas/ids/N`` or ``/schemas/guids/GUID`` below the configured address, and nowhere else: no redirect is
   followed, nothing in a record or schema becomes part of an address but a checked number or GUID.
3. *The answer* is one of:

   * a schema: parsed and put through the gate of :mod:`consumer.avro_schemas`. What the gate refuses, and an answer too
     large to be read, is ``unsafe_schema``. Both are kept: what an id means never changes.
   * the registry's own "no such schema": ``unknown_schema``, believed for :data:`UNKNOWN_SECONDS`.
   * anything else, or none in time: the registry is *unavailable*. Refused credentials, a redirect, and a 404 that is
     not the registry's belong here too: a wrong setting must not condemn records. It is asked again, with backoff, for
     as long as somebody waits (:attr:`SchemaRegistry.waiting`).

Everything is bounded: schemas by number and size, unknown ids by number, requests by rate, answers by size and time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import aiohttp

from consumer.avro_schemas import DEPTH_MAX, SCHEMA_BYTES_MAX, Schema, read_schema
from consumer.certificates import trusting
from consumer.errors import ConfigError, DecodeError
from consumer.log import get_logger
from consumer.retry import RetryPolicy

RETRY = RetryPolicy(initial_seconds=0.2, max_seconds=5.0, attempt_timeout_seconds=10.0)
"""Waits while the registry is unavailable, and the time of one request. Registries answer an id from memory, in
milliseconds; after 10 s a request is lost. Its number of attempts means nothing here."""

UNKNOWN_SECONDS = 60.0
"""How long an id counts as unknown (contract 2.4)."""

UNKNOWN_MAX = 10_000
"""Unknown ids remembered; the oldest is forgotten first. About 2 MB."""

SCHEMAS_MAX = 256
"""Schemas kept, the ones used last. Producers of one topic have a few."""

SCHEMAS_BYTES_MAX = 8 * 1024 * 1024
"""Text of all schemas kept; parsed it takes about twenty times as much memory, whoever registered it."""

ANSWER_BYTES_MAX = 2 * SCHEMA_BYTES_MAX
"""Largest answer read. A schema's text is a JSON string in it, where every quotation mark takes two characters."""

ASKED_PER_SECOND = 100
"""Requests a second; as many may come at once. A flood of ids nobody knows costs the registry no more than this."""

CONNECTIONS_MAX = 4
"""Requests at a time."""

ID_MAX = 2**31 - 1
"""Registries count with signed numbers; a frame could hold twice as many."""

_NUMBER = re.compile(r"[0-9]{1,10}")
_GUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_Answer = TypeVar("_Answer")

log = get_logger(__name__)


class _Unavailable(Exception):
    """No answer from which something could be concluded about a schema; the text says what there was instead."""


class SchemaRegistry:
    """Knows writer schemas by the id in a frame; the decoder's resolver. Belongs to one event loop.

    Args:
        url: Its address; paths are appended.
        username: For basic authentication, with *password*.
        password: As above.
        bearer_token: Instead of both.
        ssl_ca_file: PEM file of the only authorities to trust; None = those of the system.
        depth_max: Deepest nesting of types a schema may have.
        retry: Waits while it is unavailable, and the time of one request.
        now: Monotonic seconds.

    Raises:
        ConfigError: the address holds a user name or a query, or the PEM file cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        bearer_token: str | None = None,
        ssl_ca_file: Path | None = None,
        depth_max: int = DEPTH_MAX,
        retry: RetryPolicy = RETRY,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        parts = urlsplit(url)
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError("schema_registry.url has no query and no credentials; those have settings of their own")
        self._url = url.rstrip("/")
        self._headers = {
            "Accept": "application/vnd.schemaregistry.v1+json, application/json",
            "Accept-Encoding": "identity",  # so that the bytes counted are the bytes there are
        }
        if bearer_token is not None:
            self._headers["Authorization"] = f"Bearer {bearer_token}"
        elif username is not None:
            pair = f"{username}:{password or ''}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        self._ssl = trusting(ssl_ca_file, "schema_registry.ssl_ca_file") if parts.scheme == "https" else None
        self._depth_max = depth_max
        self._retry = retry
        self._now = now
        self._session: aiohttp.ClientSession | None = None
        self._schemas: OrderedDict[str, tuple[Schema | DecodeError, int]] = OrderedDict()
        """By id, the one used last at the end: the schema or why it is refused, and the size of its text."""
        self._bytes = 0
        self._unknown: dict[str, float] = {}
        """By id, oldest first: until when nobody knows it."""
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By id: held by whoever asks for it."""
        self._earliest = float("-inf")
        """When the next request would be due if all went out evenly."""
        self._unanswered = 0
        """Callers whose last request had no answer, and who go on asking."""
        self._said: str | None = None
        """What was wrong last, so that it is logged once."""

    @property
    def waiting(self) -> bool:
        """True while somebody waits for a registry that is unavailable."""
        return self._unanswered > 0

    # ------------------------------------------------------------------------------------------ without waiting

    def knows(self, schema_id: str) -> bool:
        """Tell whether :meth:`lookup` has an answer, be it that there is no such schema."""
        if schema_id in self._schemas:
            return True
        until = self._unknown.get(schema_id)
        if until is None:
            return not _can_exist(schema_id)
        if self._now() < until:
            return True
        del self._unknown[schema_id]
        return False

    def lookup(self, schema_id: str) -> Schema | None:
        """Return the schema, None where there is none of that id, or none that has been asked for.

        Raises:
            DecodeError: ``unsafe_schema``.
        """
        found = self._schemas.get(schema_id)
        if found is None:
            return None
        self._schemas.move_to_end(schema_id)
        schema = found[0]
        if isinstance(schema, DecodeError):
            raise DecodeError(str(schema), code=schema.code)  # a new one: one raised again collects its tracebacks
        return schema

    # ------------------------------------------------------------------------------------------ with waiting

    async def ensure(self, schema_id: str) -> None:
        """Return once :meth:`lookup` has an answer: at once where it has, else when the registry has given one.

        The answer is there for whoever goes on without waiting for something else.

        Cancellation: whoever else waits for the same id asks on.
        """
        if self.knows(schema_id):
            return
        turn = self._turns.get(schema_id)
        if turn is None:
            turn = self._turns[schema_id] = asyncio.Lock()
        async with turn:
            while not self.knows(schema_id):
                await self._until_answered(partial(self._ask, schema_id))

    async def register(self, subject: str, text: str) -> int:
        """Return the id of the Avro schema *text* under *subject*, where it is registered unless it is there already.

        Waits while the registry is unavailable. *subject* is put into an address as it is, so of a topic's characters.

        Raises:
            ConfigError: the registry refuses; the text has its answer.
        """
        body = json.dumps({"schema": text}).encode()
        path = f"/subjects/{subject}"
        # Looking first needs no right to write where somebody else has registered it.
        status, answer = await self._until_answered(partial(self._request, "POST", path, body))
        if status == 404:
            status, answer = await self._until_answered(partial(self._request, "POST", f"{path}/versions", body))
        fields = _fields(answer)
        schema_id = fields.get("id")
        if status != 200 or not isinstance(schema_id, int) or not 0 <= schema_id <= ID_MAX:
            reason = str(fields.get("message", "without a reason"))[:300]
            raise ConfigError(
                f"output.framing confluent: the schema registry does not take the response schema for {subject}: "
                f"it answers with {status}, {reason}"
            )
        log.info("response schema registered", subject=subject, schema_id=schema_id)
        return schema_id

    async def close(self) -> None:
        """Close its connections. Nobody may be waiting."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ------------------------------------------------------------------------------------------ asking

    async def _until_answered(self, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Ask until there is an answer."""
        failed = 0
        try:
            while True:
                try:
                    answer = await ask()
                except _Unavailable as error:
                    failed += 1
                    self._unanswered += failed == 1
                    self._say(str(error))
                else:
                    if self._said is not None:
                        self._said = None
                        log.info("schema registry answers again")
                    return answer
                await asyncio.sleep(self._retry.backoff(failed, random.random()))  # noqa: S311 - jitter, not a secret
        finally:
            self._unanswered -= failed > 0

    def _say(self, wrong: str) -> None:
        if wrong != self._said:
            self._said = wrong
            log.error("schema registry unavailable: what needs it waits", error=wrong)

    async def _ask(self, schema_id: str) -> None:
        """Ask once for a schema, and keep the answer.

        Raises:
            _Unavailable: there was none.
        """
        is_guid = len(schema_id) == 36
        status, answer = await self._request("GET", f"/schemas/{'guids' if is_guid else 'ids'}/{schema_id}")
        if status == 200:
            self._keep(schema_id, answer)
        elif _says_unknown(status, answer) or (is_guid and status == 404 and await self._is_registry()):
            if len(self._unknown) >= UNKNOWN_MAX:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[schema_id] = self._now() + UNKNOWN_SECONDS
        elif 300 <= status < 400:
            raise _Unavailable(f"it answers with a redirect ({status}), which is not followed")
        else:
            raise _Unavailable(f"it answers with {status}")

    async def _is_registry(self) -> bool:
        """Tell whether there is a registry at the address at all: older ones have no path for GUIDs, and no GUIDs."""
        status, answer = await self._request("GET", f"/schemas/ids/{ID_MAX}")
        return status == 200 or _says_unknown(status, answer)

    def _keep(self, schema_id: str, answer: bytes | None) -> None:
        """Keep what the registry says the schema is, and let go of what was not used for the longest time.

        Raises:
            _Unavailable: that is nothing a registry would say.
        """
        schema, size = self._read(answer)
        self._schemas[schema_id] = (schema, size)
        self._bytes += size
        while len(self._schemas) > SCHEMAS_MAX or self._bytes > SCHEMAS_BYTES_MAX:
            _, (_, size) = self._schemas.popitem(last=False)
            self._bytes -= size

    def _read(self, answer: bytes | None) -> tuple[Schema | DecodeError, int]:
        """Return the schema in an answer, or why it is refused, and the size of its text."""
        if answer is None:
            return _unsafe(f"the registry's answer has more than {ANSWER_BYTES_MAX} bytes"), 0
        fields = _fields(answer)
        text = fields.get("schema")
        if not isinstance(text, str):
            raise _Unavailable("it answers with something that is not a schema")
        if fields.get("references"):
            return _unsafe("the schema refers to others"), 0
        try:
            return read_schema(text, depth_max=self._depth_max), len(text)
        except DecodeError as error:
            return _unsafe(str(error)), 0

    async def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes | None]:
        """Make one request; return status and answer, which is None where it is too large.

        Raises:
            _Unavailable: no answer, or one that says that there will be one later.
        """
        await self._pace()
        session = self._session
        if session is None:
            session = self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, ssl=True if self._ssl is None else self._ssl),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=self._retry.attempt_timeout_seconds),
                auto_decompress=False,
            )
        headers = {} if body is None else {"Content-Type": "application/vnd.schemaregistry.v1+json"}
        try:
            async with session.request(
                method, self._url + path, data=body, headers=headers, allow_redirects=False
            ) as response:
                status = response.status
                if status == 429 or status >= 500:
                    raise _Unavailable(f"it answers with {status}")
                return status, await _bounded(response.content)
        except TimeoutError:
            raise _Unavailable(f"no answer within {self._retry.attempt_timeout_seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Unavailable(f"no answer: {str(error) or type(error).__name__}") from error

    async def _pace(self) -> None:
        """Wait until a request is due: :data:`ASKED_PER_SECOND`, of which a second's worth may come at once."""
        now = self._now()
        self._earliest = max(self._earliest, now - 1.0) + 1 / ASKED_PER_SECOND
        if self._earliest > now:
            await asyncio.sleep(self._earliest - now)


def _unsafe(why: str) -> DecodeError:
    return DecodeError(why, code="unsafe_schema")


def _can_exist(schema_id: str) -> bool:
    """Tell whether a registry could have a schema of that id. A fingerprint is none of its ids."""
    if _NUMBER.fullmatch(schema_id):
        return int(schema_id) <= ID_MAX
    return _GUID.fullmatch(schema_id) is not None


async def _bounded(content: aiohttp.StreamReader) -> bytes | None:
    """Read all of an answer; None where that is more than :data:`ANSWER_BYTES_MAX`."""
    answer = bytearray()
    async for part in content.iter_any():
        answer += part
        if len(answer) > ANSWER_BYTES_MAX:
            return None
    return bytes(answer)


def _fields(answer: bytes | None) -> dict[str, Any]:
    """Return the fields of an answer; none where it is not a JSON object."""
    try:
        fields = json.loads(answer or b"{}")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _says_unknown(status: int, answer: bytes | None) -> bool:
    """Tell whether it is the registry that does not know the schema (40403 and its like), not a server the path."""
    code = _fields(answer).get("error_code")
    return status == 404 and isinstance(code, int) and 40400 <= code <= 40499
