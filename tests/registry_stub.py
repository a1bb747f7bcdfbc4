"""A schema registry for tests: ids, GUIDs and subjects as the documented interface has them, and every way to be ill.

:class:`RegistryStub` serves on the event loop of its test; :class:`StandingRegistry` gives it a thread of its own, for
tests of child processes. The frames of the wire format are written here by hand, from its documentation:

* ``00``, the id as four bytes, highest first, then the datum;
* ``01``, the GUID's sixteen bytes, then the datum;
* header ``__value_schema_id`` with ``01`` and the GUID, and the datum alone as the value.
"""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

UNKNOWN = 40403
"""The registry's own code for "schema not found"; a server that does not know the path answers with a plain 404."""


def by_id(schema_id: int, datum: bytes) -> bytes:
    """Frame *datum* by id."""
    return b"\x00" + schema_id.to_bytes(4) + datum


def by_guid(guid: uuid.UUID, datum: bytes) -> bytes:
    """Frame *datum* by GUID."""
    return b"\x01" + guid.bytes + datum


def guid_header(guid: uuid.UUID) -> tuple[str, bytes]:
    """The header that frames a value."""
    return "__value_schema_id", b"\x01" + guid.bytes


def guid_of(schema_id: int) -> uuid.UUID:
    """The GUID of the schema with that id."""
    return uuid.uuid5(uuid.NAMESPACE_OID, str(schema_id))


@dataclass(frozen=True)
class Canned:
    """An answer instead of the right one."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    endless: bool = False
    """The body again and again, until the client goes away."""


def json_of(status: int, **fields: Any) -> Canned:
    """A canned answer with *fields*."""
    return Canned(status, json.dumps(fields).encode(), {"Content-Type": "application/json"})


class RegistryStub:
    """Knows schemas by id, counted from 1, and by GUID."""

    def __init__(self) -> None:
        self.schemas: list[dict[str, Any]] = []
        """What is said of each: ``schema``, and more where a test adds it."""
        self.subjects: dict[str, list[int]] = {}
        self.asked: list[str] = []
        """Method and path of every request."""
        self.headers: list[dict[str, str]] = []
        """Headers of every request."""
        self.canned: dict[str, Canned] = {}
        """What a path answers instead, ``*`` any."""
        self.gate = asyncio.Event()
        """Answers wait for it; open at first."""
        self.gate.set()
        self.port = 0
        """Chosen at the first start, and the same from then on."""
        self._runner: web.AppRunner | None = None
        self._came = asyncio.Event()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, schema: Any, **fields: Any) -> int:
        """Add a schema, given as JSON or as its text; return its id."""
        self.schemas.append({"schema": schema if isinstance(schema, str) else json.dumps(schema), **fields})
        return len(self.schemas)

    async def start(self) -> None:
        """Begin to listen."""
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Listen no more; break off what is being answered."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def wait_asked(self, times: int) -> None:
        """Wait until so many requests have come."""
        while len(self.asked) < times:
            self._came.clear()
            await self._came.wait()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        self.headers.append(dict(request.headers))
        self._came.set()
        await self.gate.wait()
        canned = self.canned.get(request.path, self.canned.get("*"))
        if canned is None:
            canned = self._right(request.method, request.path, await request.text())
        if canned.endless:
            return await self._without_end(request, canned)
        return web.Response(status=canned.status, body=canned.body, headers=canned.headers)

    async def _without_end(self, request: web.Request, canned: Canned) -> web.StreamResponse:
        response = web.StreamResponse(status=canned.status)
        await response.prepare(request)
        while True:
            await response.write(canned.body)

    def _right(self, method: str, path: str, body: str) -> Canned:
        match method, path.split("/")[1:]:
            case "GET", ["schemas", "ids", number]:
                return self._schema(int(number))
            case "GET", ["schemas", "guids", guid]:
                known = {str(guid_of(schema_id)): schema_id for schema_id in range(1, len(self.schemas) + 1)}
                return self._schema(known.get(guid, 0))
            case "POST", ["subjects", subject]:
                schema_id = self._find(subject, json.loads(body)["schema"])
                if schema_id is None:
                    return json_of(404, error_code=UNKNOWN, message="Schema not found")
                return json_of(200, subject=subject, version=1, id=schema_id, **self.schemas[schema_id - 1])
            case "POST", ["subjects", subject, "versions"]:
                text = json.loads(body)["schema"]
                schema_id = self._find(subject, text) or self.add(text)
                versions = self.subjects.setdefault(subject, [])
                if schema_id not in versions:
                    versions.append(schema_id)
                return json_of(200, id=schema_id, guid=str(guid_of(schema_id)), subject=subject, schema=text)
        return json_of(404, error_code=404, message="HTTP 404 Not Found")

    def _schema(self, schema_id: int) -> Canned:
        if not 1 <= schema_id <= len(self.schemas):
            return json_of(404, error_code=UNKNOWN, message=f"Schema {schema_id} not found")
        return json_of(200, guid=str(guid_of(schema_id)), **self.schemas[schema_id - 1])

    def _find(self, subject: str, text: str) -> int | None:
        wanted = json.loads(text)
        for schema_id in self.subjects.get(subject, []):
            if json.loads(self.schemas[schema_id - 1]["schema"]) == wanted:
                return schema_id
        return None


class StandingRegistry:
    """A stub on a thread of its own: for child processes, and to be switched off and on."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="registry stub", daemon=True)
        self._thread.start()
        self.stub = self._call(self._make())

    async def _make(self) -> RegistryStub:
        stub = RegistryStub()
        await stub.start()
        return stub

    def _call(self, doing: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(10)

    def up(self) -> None:
        """Listen again, on the same port."""
        self._call(self.stub.start())

    def down(self) -> None:
        """Refuse connections."""
        self._call(self.stub.stop())

    def close(self) -> None:
        """End it."""
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
