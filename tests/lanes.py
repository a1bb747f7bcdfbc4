"""Doubles around an assignment: records as fetched, lanes that answer when told, and everything one needs to run."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from typing import Any

from consumer.assignment import Assignment, Owner, Pipeline
from consumer.budget import ByteBudget
from consumer.codec import OperationDecoder
from consumer.executor import StreamExecutor
from consumer.handler import Handler, Storage
from consumer.metrics import Counts
from consumer.permits import ConcurrencyLimiter
from consumer.responses import Header
from consumer.retry import RetryPolicy
from consumer.service import StorageService
from consumer.suspects import Note
from wire import operation, read_response

TIMESTAMP_MS = 1_700_000_000_000

PATIENCE_SECONDS = 20.0
"""Bound of a wait that ends much earlier where the code is right; not a measure of anything."""


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until *condition* holds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - it depends on tasks of the code under test, which set no event
            await asyncio.sleep(0)


@dataclass
class Fetched:
    """A record as the client hands it over."""

    offset: int
    value: bytes | None
    key: bytes | None = b"key"
    timestamp: int = TIMESTAMP_MS
    headers: Sequence[tuple[str, bytes]] = ()


def fetched(kind: str, offset: int, key: str | None = None, payload: bytes = b"payload", **more: Any) -> Fetched:
    """Make a record with an operation; the object's key is its offset unless given."""
    name = f"object-{offset}" if key is None and kind != "insert" else key
    value = operation(kind, name, payload if kind == "insert" else b"", **more)
    return Fetched(offset, value)


def inserts(first: int, count: int) -> list[Fetched]:
    """Make inserts of one object each, at successive offsets."""
    return [fetched("insert", offset, f"object-{offset}") for offset in range(first, first + count)]


def poison(offset: int) -> Fetched:
    """Make a record that cannot be decoded."""
    return Fetched(offset, b"\x02no operation")


@dataclass
class Appended:
    """What was handed in to a lane."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[Header]
    owner: Owner
    token: int

    @property
    def response(self) -> dict[str, Any]:
        """The response in it."""
        assert self.value is not None
        return read_response(self.value)

    @property
    def code(self) -> str | None:
        """The code of the failure in it, None where it is none."""
        name, result = self.response["result"]
        return result["code"] if name == "Failure" else None

    def header(self, name: str) -> bytes | None:
        """The value of a header, None where there is none of the name."""
        return dict(self.headers).get(name)


class CommandedLane:
    """A lane that acknowledges and refuses on command, as the publisher does: in order, each record once."""

    def __init__(self) -> None:
        self.appended: list[Appended] = []
        """Everything handed in, in order."""
        self.waiting: deque[Appended] = deque()
        """What is neither acknowledged nor refused."""
        self.acknowledging = False
        """True: acknowledge everything, as soon as the event loop turns."""

    def append(
        self, key: bytes | None, value: bytes | None, headers: Sequence[Header], owner: Owner, token: int
    ) -> None:
        record = Appended(key, value, headers, owner, token)
        self.appended.append(record)
        self.waiting.append(record)
        if self.acknowledging:
            asyncio.get_running_loop().call_soon(self.acknowledge)

    def acknowledge(self, count: int | None = None) -> None:
        """Acknowledge the first *count* that wait, or all."""
        taken = [self.waiting.popleft() for _ in range(len(self.waiting) if count is None else count)]
        for owner, group in groupby(taken, lambda record: record.owner):
            owner.acknowledged([record.token for record in group])

    def acknowledge_always(self) -> None:
        """Acknowledge all that wait, and whatever comes."""
        self.acknowledging = True
        self.acknowledge()

    def refuse(self) -> None:
        """Refuse the first that waits, for its size; what its owner hands in instead takes its place."""
        refused = self.waiting.popleft()
        before = len(self.waiting)
        refused.owner.refused(refused.token)
        self.waiting.rotate(len(self.waiting) - before)

    @property
    def tokens(self) -> list[int]:
        """The tokens of everything handed in, in order."""
        return [record.token for record in self.appended]


@dataclass
class Workplace:
    """Everything the assignments of one process share, and what they told the poller."""

    storage: Storage
    limit: int = 10
    budget_bytes: int = 64 * 1024 * 1024
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the :class:`Pipeline` that differ from the usual ones."""
    retry: RetryPolicy | None = None
    make_assignment: Callable[..., Assignment] = Assignment
    make_handler: Callable[..., Handler] = Handler

    def __post_init__(self) -> None:
        """Build the parts."""
        self.responses = CommandedLane()
        self.dead_letters = CommandedLane()
        self.counts = Counts()
        self.limiter = ConcurrencyLimiter(self.limit)
        self.budget = ByteBudget(self.budget_bytes)
        self.service = StorageService(
            self.storage, self.limiter, retry=self.retry, counts=self.counts, make_handler=self.make_handler
        )
        usual: dict[str, Any] = {
            "service": self.service,
            "decoder": OperationDecoder(),
            "budget": self.budget,
            "counts": self.counts,
            "response_lane": lambda _partition: self.responses,
            "dead_letter_lane": lambda _partition: self.dead_letters,
            "cluster_id": "cluster",
            "group_id": "group",
            "ordering": "key",
            "fraction": Fraction(1),
            "copy_headers": frozenset({"traceparent"}),
            "response_prefix": b"",
            "response_bytes_max": 1024 * 1024,
            "dead_letter_bytes_max": 1024 * 1024,
            "read_bytes": 1024,
            "derive_keys": True,
            "show_keys": False,
        }
        self.pipeline = Pipeline(**(usual | self.changes))
        self.refills: list[Assignment] = []
        self.resolved = 0
        self.failures: list[BaseException] = []
        self.wanted: list[Assignment] = []
        self.freed = 0
        self.assignments: list[Assignment] = []

    def window(self, permits: int) -> StreamExecutor:
        """Reserve a window."""
        return self.service.stream(ordering=self.pipeline.ordering, window=permits)

    def assign(
        self, partition: int = 0, window: int | None = 5, *, begin: int | None = 0, note: Note | None = None
    ) -> Assignment:
        """Make an assignment, with a window unless that is None, and open it at *begin* unless that is None."""
        made = self.make_assignment(
            self.pipeline,
            "operations",
            partition,
            epoch=1,
            executor=None if window is None else self.window(window),
            refill=self.refills.append,
            resolved=self._count,
            failed=self.failures.append,
            wanted=self.wanted.append,
            freed=self._count_freed,
            note=note,
        )
        self.assignments.append(made)
        if begin is not None:
            made.begin(begin)
        return made

    def _count(self, records: int) -> None:
        self.resolved += records

    def _count_freed(self) -> None:
        self.freed += 1

    async def clear_up(self) -> None:
        """End every assignment, whatever state it is in."""
        for assignment in self.assignments:
            running = await assignment.abandon()
            if running is not None:
                await running.wait_finished()
