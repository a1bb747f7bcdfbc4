"""A Google Cloud Storage for tests: what tierstream uses of its JSON API, kept to the letter, and every way to fail.

:class:`StrictGcs` serves from threads of its own, so that a client in any thread, loop or process can be held up
without holding up the server. What the documentation says and emulators leave out is kept here:

* Preconditions count everywhere: on insert, at the beginning *and* the end of a resumable upload, on read, patch,
  delete and rewrite, for the destination and for the source.
* A CRC-32C that came with an upload is compared before anything is stored.
* Pieces of a resumable upload but the last one are multiples of 256 KiB, and begin where the last one ended. An upload
  is visible when it is whole, not before. Asking how far it is changes nothing.
* Custom time never goes back. Pairs have at most 8 KiB. Names have at most 1,024 bytes and are not ``.`` or ``..``.
* A list gives the fields asked for and no others.
* A stored content encoding is sent along, so that a client that decodes by itself notices.

A :class:`Fault` stands in front of one request of one kind: see :meth:`StrictGcs.plan`.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

Kind: TypeAlias = Literal[
    "insert", "begin", "piece", "ask", "cancel", "media", "find", "patch", "delete", "list", "rewrite"
]
"""What a request is: ``insert`` an upload in one, ``piece`` one of a resumable upload, ``ask`` how far that is."""

QUARTER = 256 * 1024
STALL_SECONDS = 30.0
"""Longest a stalled request waits to be released: a test that forgets is ended by its own time limit first."""


@dataclass
class Fault:
    """What goes wrong with one request."""

    status: int | None = None
    """Answer this, and have no effect."""
    before: bool = False
    """Cut the connection before anything has an effect."""
    after_effect: bool = False
    """Have the effect, then cut the connection: the answer is lost."""
    stall: bool = False
    """Say nothing, and have no effect, before :meth:`StrictGcs.release`; then go on as if nothing had happened."""
    truncate: bool = False
    """Send half of what was announced, then cut the connection."""
    damage: bool = False
    """Flip a bit on the way: in the answer of a read, else in what has arrived."""
    lie: bool = False
    """Store other bytes than have arrived, and compare nothing: what the checksum in the answer is for."""
    whole: bool = False
    """Answer a read with the whole payload, whatever range was asked for."""
    short: bool = False
    """Answer a read with one byte less than asked for, and say so."""
    lose: bool = False
    """Of a resumable upload, lose all that has arrived."""
    keep: int | None = None
    """Of a piece, keep only so many bytes, and say so."""
    forget: bool = False
    """Give up the resumable upload it belongs to."""


@dataclass
class Stored:
    """One object."""

    payload: bytes
    fields: dict[str, Any]
    generation: int
    metageneration: int = 1


@dataclass
class Session:
    """One resumable upload."""

    bucket: str
    fields: dict[str, Any]
    params: dict[str, str]
    arrived: bytearray = field(default_factory=bytearray)
    resource: dict[str, Any] | None = None
    """What was answered when it ended."""


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StrictGcs:
    """The server; :attr:`endpoint` is where it is. Use it as a context manager."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.requests: list[tuple[Kind, dict[str, str]]] = []
        """What has been asked for, with its parameters, in order of arrival."""
        self.rewrite_steps = 1
        """Requests that one copy takes."""
        self.serving = 0
        """Requests that have arrived and are not done with."""
        self.stalled = threading.Semaphore(0)
        """Counts the requests that have begun to stall."""
        self._faults: list[tuple[Kind, Fault]] = []
        self._sessions: dict[str, Session] = {}
        self._lock = threading.RLock()
        self._released = threading.Event()
        self._next = int(time.time() * 1_000_000)
        gcs = self

        class Handler(_Handler):
            server_gcs = gcs

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def bucket(self, name: str) -> dict[str, Stored]:
        """Return the objects of a bucket, made where there is none."""
        return self.buckets.setdefault(name, {})

    def plan(self, kind: Kind, times: int = 1, after: int = 0, **fault: Any) -> None:
        """Have the next *times* requests of a *kind* go wrong, *after* so many that do not."""
        planned = [Fault()] * after + [Fault(**fault)] * times
        self._faults += [(kind, one) for one in planned]

    def release(self) -> None:
        """Let stalled requests go on, and all later ones."""
        self._released.set()

    def idle(self, seconds: float = 20.0) -> None:
        """Wait until no request is being served any more, also of clients that have gone away."""
        deadline = time.monotonic() + seconds
        while self.serving:
            assert time.monotonic() < deadline, f"{self.serving} requests are still being served"
            time.sleep(0.005)

    def kinds(self) -> list[Kind]:
        """Return what has been asked for, in order."""
        return [kind for kind, _ in self.requests]

    # ------------------------------------------------------------------------------------------------- for the handler

    def fault_for(self, kind: Kind, params: dict[str, str]) -> Fault:
        """Note a request and return what is to go wrong with it."""
        with self._lock:
            self.requests.append((kind, params))
            for at, (planned, fault) in enumerate(self._faults):
                if planned == kind:
                    del self._faults[at]
                    return fault
        return Fault()

    def serve(self, more: int) -> None:
        """Count a request that has arrived, or is done with."""
        with self._lock:
            self.serving += more

    def wait_for_release(self) -> None:
        """Stall."""
        self.stalled.release()
        self._released.wait(STALL_SECONDS)

    def objects(self, bucket: str) -> dict[str, Stored]:
        """Return the objects of a bucket that has to be there."""
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[bucket]

    def found(self, bucket: str, name: str, params: dict[str, str], prefix: str = "") -> Stored:
        """Return an object, if it is there and as the request says it has to be."""
        stored = self.objects(bucket).get(name)
        generation = params.get(f"{prefix}generation" if not prefix else f"{prefix}Generation")
        if stored is None or (generation is not None and int(generation) != stored.generation):
            raise Refused(404, f"No such object: {bucket}/{name}")
        match = params.get(f"if{prefix.capitalize()}GenerationMatch")
        if match is not None and int(match) != stored.generation:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        match = params.get(f"if{prefix.capitalize()}MetagenerationMatch")
        if match is not None and int(match) != stored.metageneration:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        return stored

    def check_free(self, bucket: str, name: str, params: dict[str, str]) -> None:
        """Hold the precondition of an upload against what is there."""
        if len(name.encode()) > 1024 or not name or name in {".", ".."} or "\n" in name or "\r" in name:
            raise Refused(400, "Invalid object name.")
        match = params.get("ifGenerationMatch")
        stored = self.objects(bucket).get(name)
        if match is not None and int(match) != (stored.generation if stored is not None else 0):
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def store(
        self, bucket: str, fields: dict[str, Any], payload: bytes, params: dict[str, str], crc32c: str | None
    ) -> dict[str, Any]:
        """Make an object and return what is said of it."""
        name = fields.get("name") or params.get("name") or ""
        self.check_free(bucket, name, params)
        check_pairs(fields)
        calculated = crc32c_of(payload)
        for given in (crc32c, fields.get("crc32c")):
            if given is not None and given != calculated:
                raise Refused(400, f'Provided CRC32C "{given}" doesn\'t match calculated CRC32C "{calculated}".')
        self._next += 1
        kept = {key: value for key, value in fields.items() if key not in {"name", "crc32c", "md5Hash"}}
        self.objects(bucket)[name] = Stored(payload, kept, self._next)
        return self.resource(bucket, name)

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        """Return what is said of an object."""
        stored = self.objects(bucket)[name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "generation": str(stored.generation),
            "metageneration": str(stored.metageneration),
            "size": str(len(stored.payload)),
            "crc32c": crc32c_of(stored.payload),
        } | stored.fields

    def locked(self, do: Callable[[], Any]) -> Any:
        """Do something while nothing else is done."""
        with self._lock:
            return do()

    def session(self, upload_id: str) -> Session:
        """Return a resumable upload that has been begun and not given up."""
        if upload_id not in self._sessions:
            raise Refused(404, "No such upload.")
        return self._sessions[upload_id]

    def begin(self, session: Session) -> str:
        """Begin a resumable upload and return its id."""
        self._next += 1
        self._sessions[str(self._next)] = session
        return str(self._next)

    def forget(self, upload_id: str) -> None:
        """Give up a resumable upload."""
        self._sessions.pop(upload_id, None)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # a window connects at once
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients go away while they are answered, and that is what is tested."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_gcs: StrictGcs

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing."""

    def do_GET(self) -> None:
        gcs = self.server_gcs
        gcs.serve(1)
        try:
            self._handle()
        finally:
            gcs.serve(-1)

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_PATCH(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def _handle(self) -> None:
        address = urlsplit(self.path)
        params = {name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        steps = [unquote(step) for step in address.path.split("/")[1:]]
        kind, run = self._route(steps, params)
        gcs = self.server_gcs
        fault = gcs.fault_for(kind, params)
        if fault.before:
            self._cut()
            return
        if fault.stall:
            gcs.wait_for_release()
        if fault.damage and kind != "media":
            body = flipped(body)
        try:
            answer = refusal(fault.status, "planned") if fault.status else gcs.locked(lambda: run(body, fault))
        except Refused as error:
            answer = refusal(error.status, str(error))
        if fault.after_effect:
            self._cut()
            return
        self._answer(*answer, fault=fault if kind == "media" else Fault())

    def _route(self, steps: list[str], params: dict[str, str]) -> tuple[Kind, Callable[[bytes, Fault], Any]]:
        match self.command, steps:
            case "POST", ["upload", "storage", "v1", "b", bucket, "o"] if params.get("uploadType") == "multipart":
                return "insert", lambda body, fault: self._insert(bucket, params, body, fault)
            case "POST", ["upload", "storage", "v1", "b", bucket, "o"]:
                return "begin", lambda body, _fault: self._begin(bucket, params, body)
            case "PUT", ["upload", "storage", "v1", "b", _, "o"]:
                asked = self.headers["Content-Range"].startswith("bytes */")
                return "ask" if asked else "piece", lambda body, fault: self._piece(params["upload_id"], body, fault)
            case "DELETE", ["upload", "storage", "v1", "b", _, "o"]:
                return "cancel", lambda _body, _fault: self._cancel(params["upload_id"])
            case "GET", ["download", "storage", "v1", "b", bucket, "o", name]:
                return "media", lambda _body, fault: self._media(bucket, name, params, fault)
            case "GET", ["storage", "v1", "b", bucket, "o"]:
                return "list", lambda _body, _fault: self._list(bucket, params)
            case "GET", ["storage", "v1", "b", bucket, "o", name]:
                return "find", lambda _body, _fault: self._find(bucket, name, params)
            case "PATCH", ["storage", "v1", "b", bucket, "o", name]:
                return "patch", lambda body, _fault: self._patch(bucket, name, params, body)
            case "DELETE", ["storage", "v1", "b", bucket, "o", name]:
                return "delete", lambda _body, _fault: self._delete(bucket, name, params)
            case "POST", ["storage", "v1", "b", bucket, "o", name, "rewriteTo", "b", to, "o", new]:
                return "rewrite", lambda body, _fault: self._rewrite((bucket, name), (to, new), params, body)
        raise AssertionError(f"not a request the strict server knows: {self.command} {self.path}")

    # ------------------------------------------------------------------------------------------------- requests

    def _insert(self, bucket: str, params: dict[str, str], body: bytes, fault: Fault) -> Any:
        boundary = re.search(r'boundary="(.+)"', self.headers["Content-Type"])
        assert boundary is not None
        _, description, content, _ = body.split(b"--" + boundary[1].encode())
        fields = json.loads(description.split(b"\r\n\r\n", 1)[1])
        head, payload = content.split(b"\r\n\r\n", 1)
        said = re.search(rb"content-type: (.+)", head)
        fields.setdefault("contentType", said[1].decode().strip() if said is not None else None)
        payload = payload[:-2]
        if fault.lie:
            return ok(self.server_gcs.store(bucket, without_crc32c(fields), flipped(payload), params, None))
        return ok(self.server_gcs.store(bucket, fields, payload, params, None))

    def _begin(self, bucket: str, params: dict[str, str], body: bytes) -> Any:
        fields = json.loads(body)
        fields.setdefault("contentType", self.headers.get("X-Upload-Content-Type"))
        self.server_gcs.check_free(bucket, fields["name"], params)
        check_pairs(fields)
        upload_id = self.server_gcs.begin(Session(bucket, fields, params))
        address = f"{self.server_gcs.endpoint}/upload/storage/v1/b/{bucket}/o"
        return 200, b"", {"Location": f"{address}?uploadType=resumable&upload_id={upload_id}"}

    def _piece(self, upload_id: str, body: bytes, fault: Fault) -> Any:
        gcs = self.server_gcs
        if fault.forget:
            gcs.forget(upload_id)
        session = gcs.session(upload_id)
        if fault.lose:
            session.arrived.clear()
            return 308, b"", {}
        if session.resource is not None:
            return ok(session.resource)
        extent = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\*|\d+)", self.headers["Content-Range"])
        assert extent is not None, self.headers["Content-Range"]
        total = None if extent[3] == "*" else int(extent[3])
        if extent[1] is not None:
            first, last = int(extent[1]), int(extent[2])
            if first != len(session.arrived) or last - first + 1 != len(body):
                raise Refused(400, "The piece does not begin where the last one ended.")
            if (total is None or last + 1 < total) and len(body) % QUARTER:
                raise Refused(400, "A piece that is not the last one is a multiple of 256 KiB.")
            session.arrived += body if fault.keep is None else body[: fault.keep]
        if total is None or len(session.arrived) < total:
            kept = {"Range": f"bytes=0-{len(session.arrived) - 1}"} if session.arrived else {}
            return 308, b"", kept
        payload, given, fields = bytes(session.arrived), self.headers.get("X-Goog-Hash"), session.fields
        crc32c = given.removeprefix("crc32c=") if given is not None else None
        if fault.lie:
            payload, crc32c, fields = flipped(payload), None, without_crc32c(fields)
        session.resource = gcs.store(session.bucket, fields, payload, session.params, crc32c)
        return ok(session.resource)

    def _cancel(self, upload_id: str) -> Any:
        self.server_gcs.session(upload_id)
        self.server_gcs.forget(upload_id)
        return 499, b"", {}

    def _media(self, bucket: str, name: str, params: dict[str, str], fault: Fault) -> Any:
        stored = self.server_gcs.found(bucket, name, params)
        payload = stored.payload
        headers = {
            "Content-Type": stored.fields.get("contentType") or "application/octet-stream",
            "X-Goog-Generation": str(stored.generation),
            "X-Goog-Hash": f"crc32c={crc32c_of(payload)}",
        }
        encoding = stored.fields.get("contentEncoding")
        if encoding == "gzip" and "gzip" not in self.headers.get("Accept-Encoding", ""):
            payload = gzip.decompress(payload)
        elif encoding:
            headers["Content-Encoding"] = encoding
        status = 200
        extent = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if extent is not None and not fault.whole:
            first, last = int(extent[1]), min(int(extent[2] or len(payload)), len(payload) - 1)
            if first >= len(payload):
                raise Refused(416, "The requested range cannot be satisfied.")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(payload)}"
            status, payload = 206, payload[first : last + 1]
        payload = payload[:-1] if fault.short else payload
        return status, flipped(payload) if fault.damage else payload, headers

    def _list(self, bucket: str, params: dict[str, str]) -> Any:
        names = sorted(self.server_gcs.objects(bucket), key=str.encode)
        after = base64.b64decode(params.get("pageToken", "")).decode()
        names = [name for name in names if name.startswith(params.get("prefix", "")) and name > after]
        page = names[: int(params.get("maxResults", "1000"))]
        asked = re.fullmatch(r"items\(([\w,]+)\),nextPageToken", params["fields"])
        assert asked is not None
        wanted = set(asked[1].split(","))
        answer: dict[str, Any] = {}
        if page:
            resources = [self.server_gcs.resource(bucket, name) for name in page]
            answer["items"] = [{key: one[key] for key in one if key in wanted} for one in resources]
        if len(page) < len(names):
            answer["nextPageToken"] = base64.b64encode(page[-1].encode()).decode()
        return ok(answer)

    def _find(self, bucket: str, name: str, params: dict[str, str]) -> Any:
        self.server_gcs.found(bucket, name, params)
        return ok(self.server_gcs.resource(bucket, name))

    def _patch(self, bucket: str, name: str, params: dict[str, str], body: bytes) -> Any:
        stored = self.server_gcs.found(bucket, name, params)
        given = json.loads(body)
        fields = merged(stored.fields, given)
        check_pairs(fields)
        before, now = stored.fields.get("customTime"), fields.get("customTime")
        if before is not None and (now is None or moment(now) < moment(before)):
            raise Refused(400, "Custom time cannot be removed or set to an earlier time.")
        stored.fields = fields
        stored.metageneration += 1
        return ok(self.server_gcs.resource(bucket, name))

    def _delete(self, bucket: str, name: str, params: dict[str, str]) -> Any:
        self.server_gcs.found(bucket, name, params)
        del self.server_gcs.objects(bucket)[name]
        return 204, b"", {}

    def _rewrite(self, source: tuple[str, str], target: tuple[str, str], params: dict[str, str], body: bytes) -> Any:
        gcs = self.server_gcs
        stored = gcs.found(*source, params, "source")
        gcs.check_free(*target, params)
        step = int(params.get("rewriteToken", "0")) + 1
        progress = {"objectSize": str(len(stored.payload)), "done": step >= gcs.rewrite_steps}
        if step < gcs.rewrite_steps:
            return ok(progress | {"totalBytesRewritten": "1", "rewriteToken": str(step)})
        fields = {"name": target[1]} | (json.loads(body) or stored.fields)
        resource = gcs.store(target[0], fields, stored.payload, params, None)
        return ok(progress | {"totalBytesRewritten": str(len(stored.payload)), "resource": resource})

    # ------------------------------------------------------------------------------------------------- answers

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, fault: Fault) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault.truncate else body)
        if fault.truncate:
            self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def ok(resource: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
    """Answer with a resource."""
    return 200, json.dumps(resource).encode(), {"Content-Type": "application/json; charset=UTF-8"}


def refusal(status: int, message: str) -> tuple[int, bytes, dict[str, str]]:
    """Answer with an error."""
    said = json.dumps({"error": {"code": status, "message": message}})
    return status, said.encode(), {"Content-Type": "application/json; charset=UTF-8"}


def crc32c_of(payload: bytes) -> str:
    """The CRC-32C of a payload, as the API writes it."""
    return base64.b64encode(google_crc32c.value(payload).to_bytes(4, "big")).decode()


def flipped(data: bytes) -> bytes:
    """The same bytes but for one bit in the middle."""
    if not data:
        return data
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


def without_crc32c(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields without a checksum."""
    return {key: value for key, value in fields.items() if key != "crc32c"}


def merged(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Merge as JSON merge patch does: null removes, maps are merged one level down."""
    result = dict(fields)
    for key, value in given.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = merged(result.get(key) or {}, value)
        else:
            result[key] = value
    return result


def check_pairs(fields: dict[str, Any]) -> None:
    """Hold the pairs against their limit."""
    pairs = fields.get("metadata") or {}
    if sum(len(name.encode()) + len(text.encode()) for name, text in pairs.items()) > 8192:
        raise Refused(400, "Metadata is larger than 8 KiB.")


def moment(text: str) -> datetime:
    """Read a time."""
    return datetime.fromisoformat(text).astimezone(UTC)
