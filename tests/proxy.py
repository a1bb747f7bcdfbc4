"""A connection that can be cut: a TCP proxy before a broker that knows where a Kafka request and its answer end.

The proxy stands in front of one listener of a broker that advertises the proxy's port, so that clients which bootstrap
at the proxy never get past it. Three faults:

lost answer
    `lose_answers` lets a request of one kind through, waits until the broker has answered it, and then resets the
    connection instead of handing the answer on. So the request has been applied, and its sender cannot know.
damaged answer
    `damage_answers` changes one byte near the end of a large answer of one kind: of a fetch, in its last record.
slow
    `slow` forwards requests of one kind at so many bytes a second, those of all connections together; what is behind
    them on the same connection waits.

Frames, by the Kafka protocol: a length of four bytes; then a request has its kind (two bytes), the version of that kind
(two) and a correlation id (four), an answer the correlation id alone.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from brokers import Broker, maven_broker, unused_port

PRODUCE = 0
FETCH = 1
OFFSET_COMMIT = 8
HEARTBEAT = 12
LEAVE_GROUP = 13
END_TXN = 26
TXN_OFFSET_COMMIT = 28
"""Kinds of request ("API keys")."""

REQUESTS = {
    "Produce": PRODUCE,
    "OffsetCommit": OFFSET_COMMIT,
    "TxnOffsetCommit": TXN_OFFSET_COMMIT,
    "EndTxn": END_TXN,
}
"""Those whose lost answer corrupts where it is not borne in mind, by Kafka's names."""

CONNECT_SECONDS = 5
CLOSE_SECONDS = 5
DAMAGED_BYTES_MIN = 1000
"""A fetch answer of this size holds records; below it there may be nothing but the frame."""

SLICE_BYTES = 4096
"""A slow request is forwarded in pieces of this size."""


class Proxy:
    """Listens on `port`, forwards to a port of this machine; two threads a connection, all ended by `close`."""

    def __init__(self, target: int) -> None:
        """Listen at once; *target*, a port on loopback, need not answer before the first client connects."""
        self.lost: Counter[int] = Counter()
        """Answers lost so far, by kind of request."""
        self.damaged: Counter[int] = Counter()
        """Answers damaged so far, by kind of request."""
        self.asked: Counter[int] = Counter()
        """Requests so far, by kind."""
        self.slowed_bytes = 0
        """Bytes forwarded slowly so far."""
        self._target = target
        self._to_lose: Counter[int] = Counter()
        self._to_damage: Counter[int] = Counter()
        self._slow_kind = -1
        self._bytes_per_second = 0.0
        self._free_at = 0.0
        """When all that is to go slowly so far has gone."""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._quick = threading.Event()
        """Set while nothing is slow: a slow request that is on its way is then forwarded at once."""
        self._quick.set()
        self._connections: set[_Connection] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._accepting.start()

    def lose_answers(self, kind: int, count: int) -> None:
        """Lose the next *count* answers to requests of this kind, each with its connection."""
        with self._lock:
            self._to_lose[kind] = count

    def damage_answers(self, kind: int, count: int) -> None:
        """Change a byte in each of the next *count* large answers to requests of this kind."""
        with self._lock:
            self._to_damage[kind] = count

    def slow(self, kind: int, bytes_per_second: float) -> None:
        """Forward requests of this kind at this speed, all connections together, until `quick`."""
        self._free_at = 0.0
        self._slow_kind, self._bytes_per_second = kind, bytes_per_second
        self._quick.clear()

    def quick(self) -> None:
        """Forward everything at once again."""
        self._slow_kind = -1
        self._quick.set()

    def heal(self) -> None:
        """Do nothing wrong any more."""
        with self._lock:
            self._to_lose.clear()
            self._to_damage.clear()
        self.quick()

    def close(self) -> None:
        """Reset all connections and wait for the threads."""
        self._closing.set()
        self._quick.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self._accepting.join(CLOSE_SECONDS)
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.reset()
        for connection in connections:
            connection.join()

    # ------------------------------------------------------------------------------------------ for connections

    def takes_answer(self, kind: int) -> bool:
        """Whether the answer to a request of this kind, which is here, is to be lost; counts it."""
        with self._lock:
            if not self._to_lose[kind]:
                return False
            self._to_lose[kind] -= 1
            self.lost[kind] += 1
            return True

    def answer(self, kind: int, frame: bytes) -> bytes:
        """Return an answer as it is to be handed on."""
        with self._lock:
            if not self._to_damage[kind] or len(frame) < DAMAGED_BYTES_MIN:
                return frame
            self._to_damage[kind] -= 1
            self.damaged[kind] += 1
        changed = bytearray(frame)
        changed[-20] ^= 0xFF
        return bytes(changed)

    def pieces(self, kind: int, frame: bytes) -> Iterator[bytes]:
        """Yield a request in the pieces, and at the times, in which it is to be forwarded."""
        with self._lock:
            self.asked[kind] += 1
        if kind != self._slow_kind:
            yield frame
            return
        for start in range(0, len(frame), SLICE_BYTES):
            piece = frame[start : start + SLICE_BYTES]
            self._quick.wait(self._seconds_until_gone(len(piece)))
            with self._lock:
                self.slowed_bytes += len(piece)
            yield piece

    def _seconds_until_gone(self, size: int) -> float:
        """Take the next turn on the slow line for so many bytes."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + size / self._bytes_per_second
            return self._free_at - now

    def ended(self, connection: _Connection) -> None:
        """Forget a connection."""
        with self._lock:
            self._connections.discard(connection)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                broker = socket.create_connection(("127.0.0.1", self._target), CONNECT_SECONDS)
            except OSError:
                client.close()
                continue
            broker.settimeout(None)
            connection = _Connection(self, client, broker)
            with self._lock:
                self._connections.add(connection)
            connection.start()


class _Connection:
    """One client's connection and the one made for it to the broker."""

    def __init__(self, proxy: Proxy, client: socket.socket, broker: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._broker = broker
        self._kinds: dict[int, int] = {}
        """Requests on their way: correlation id to kind."""
        self._threads = [
            threading.Thread(target=self._run, args=(half,), name=f"proxy {half.__name__}", daemon=True)
            for half in (self._requests, self._answers)
        ]
        self._left = len(self._threads)
        self._lock = threading.Lock()
        for end in (client, broker):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    def reset(self) -> None:
        """Wake both threads; the last one to end closes the sockets."""
        for end in (self._client, self._broker):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self, half: object) -> None:
        assert callable(half)
        with suppress(OSError):
            half()
        self.reset()
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._client.close()
            self._broker.close()
            self._proxy.ended(self)

    def _requests(self) -> None:
        for frame in _frames(self._client):
            kind, _, correlation = struct.unpack_from(">hhi", frame, 4)
            self._kinds[correlation] = kind
            for piece in self._proxy.pieces(kind, frame):
                self._broker.sendall(piece)

    def _answers(self) -> None:
        for frame in _frames(self._broker):
            (correlation,) = struct.unpack_from(">i", frame, 4)
            kind = self._kinds.pop(correlation)
            if self._proxy.takes_answer(kind):
                return
            self._client.sendall(self._proxy.answer(kind, frame))


def _frames(end: socket.socket) -> Iterator[bytes]:
    """Yield what *end* sends, frame by frame with its length, until it ends."""
    with end.makefile("rb") as stream:
        while len(head := stream.read(4)) == 4:
            (size,) = struct.unpack(">i", head)
            body = stream.read(size)
            if len(body) < size:
                return
            yield head + body


@contextmanager
def proxied_broker(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[tuple[Broker, Proxy]]:
    """Run Apache Kafka of one node, and the proxy before its second listener; its first one is reached directly.

    Raises:
        BrokerUnavailableError: it did not start.
    """
    port = unused_port()
    proxy = Proxy(port)
    try:
        with maven_broker(folder, settings, proxied=(port, proxy.port)) as broker:
            yield broker, proxy
    finally:
        proxy.close()
