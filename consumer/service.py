"""The storage service: one limiter in front of one storage.

* A *stream* reserves its whole window at once, before any input is read, or fails with ``AtCapacity`` (WIN-1 … WIN-5,
  RES-1); its operations take no further permits. What happens then is :mod:`consumer.executor`'s.
* A *single* operation takes one permit, runs in a task of its own and gives the permit back when it has ended. If the
  caller goes away it goes on (SVC-2).
* ``join`` waits for operations whose callers have gone, then for the background work of storage.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, cast
from weakref import WeakSet

from consumer.errors import AtCapacity
from consumer.executor import Ordering, StreamExecutor, check_ordering
from consumer.handler import Handler, References, Storage, failure_of
from consumer.log import get_logger
from consumer.operations import (
    Delete,
    Deleted,
    Get,
    Got,
    Head,
    Headed,
    Insert,
    Inserted,
    Operation,
    OpResponse,
)
from consumer.permits import FRACTION_DEFAULT, ConcurrencyLimiter, Reservation, window_size
from consumer.retry import RetryPolicy

if TYPE_CHECKING:
    from consumer.metrics import Counts, OperationCounts  # it needs prometheus_client, which the service does not

log = get_logger(__name__)


class StorageService:
    """Runs operations on *storage* within the permits of *limiter*.

    Args:
        storage: Anything with asynchronous ``put``, ``get``, ``head``, ``delete``, and optionally ``join``.
        limiter: None = one of its own, 500 permits and no queue.
        references: Opens payloads that are given by reference; None refuses them.
        retry: None makes a single attempt at each operation, without a time limit.
        on_blocked: As for :class:`~consumer.handler.Handler`.
        counts: Where operations are counted; None counts nothing.
        object_bytes_max: As for :class:`~consumer.handler.Handler`.
        make_handler: Makes what applies operations.
    """

    def __init__(
        self,
        storage: Storage,
        limiter: ConcurrencyLimiter | None = None,
        *,
        references: References | None = None,
        retry: RetryPolicy | None = None,
        on_blocked: Callable[[bool], None] | None = None,
        counts: Counts | None = None,
        object_bytes_max: int | None = None,
        make_handler: Callable[..., Handler] = Handler,
    ) -> None:
        self.limiter = ConcurrencyLimiter() if limiter is None else limiter
        """Issues the permits."""
        self._storage = storage
        self._handler = make_handler(
            storage,
            references=references,
            retry=retry,
            on_blocked=on_blocked,
            object_bytes_max=object_bytes_max,
        )
        self._counts: Mapping[str, OperationCounts] | None = None if counts is None else counts.operations
        self._singles: set[asyncio.Task[OpResponse | BaseException]] = set()
        self._streams: WeakSet[StreamExecutor] = WeakSet()

    def stream(
        self,
        *,
        fraction: Fraction | Decimal | float | str = FRACTION_DEFAULT,
        ordering: Ordering = "unordered",
        window: int | None = None,
    ) -> StreamExecutor:
        """Reserve a window and return the executor that owns it.

        Args:
            fraction: Share of the permits available now, within (0, 1], rounded up.
            ordering: See :class:`~consumer.executor.StreamExecutor`; ``partition`` reserves exactly one permit.
            window: Reserve exactly this many permits, whatever the fraction says.

        Raises:
            AtCapacity: not enough permits are available; nothing was taken.
            ValueError: an unknown *ordering*, a *fraction* outside (0, 1], or a *window* below 1; nothing was taken.
        """
        check_ordering(ordering)
        share = window_size(self.limiter.available, fraction)
        if window is None:
            window = max(share, 1)  # of nothing, the share is nothing; asking for one permit is what fails then
        elif window < 1:
            raise ValueError(f"a window is at least 1, not {window}")
        try:
            reservation = self.limiter.acquire_many_nowait(1 if ordering == "partition" else window)
        except AtCapacity as error:
            log.warning("no window to be had", code=error.code, error=str(error))
            raise
        executor = StreamExecutor(self._handler, reservation, ordering=ordering, counts=self._counts)
        self._streams.add(executor)
        return executor

    async def insert(self, operation: Insert) -> Inserted:
        """Store an object.

        Raises:
            InvalidMetadata: before a permit is taken (SVC-3).
            AtCapacity: no permit is available; storage was not reached.
            Exception: as :meth:`consumer.handler.Handler.apply`; what is not ours is an ``OperationPanic``.

        Cancellation: the operation goes on and keeps its permit; nobody hears of its outcome.
        """
        operation.metadata.validate()
        return cast("Inserted", await self._single(operation))

    async def get(self, operation: Get) -> Got:
        """Read an object, payload and metadata.

        Raises:
            Exception: as :meth:`insert`.

        Cancellation: as :meth:`insert`.
        """
        return cast("Got", await self._single(operation))

    async def delete(self, operation: Delete) -> Deleted:
        """Remove an object; removing a missing one is a success.

        Raises:
            Exception: as :meth:`insert`.

        Cancellation: as :meth:`insert`.
        """
        return cast("Deleted", await self._single(operation))

    async def head(self, operation: Head) -> Headed:
        """Read an object's metadata.

        Raises:
            Exception: as :meth:`insert`.

        Cancellation: as :meth:`insert`.
        """
        return cast("Headed", await self._single(operation))

    async def join(self) -> None:
        """Wait until no operation is in flight and storage has finished its own background work.

        Single operations are waited for even where their callers have gone, streams where operations run. Whoever
        wants it to end begins nothing more.

        Cancellation: stops waiting; what is waited for goes on.
        """
        while self._singles:
            await asyncio.wait(self._singles)
        for stream in list(self._streams):
            await stream.wait_finished()
        join = getattr(self._storage, "join", None)
        if join is not None:
            await join()

    async def _single(self, operation: Operation) -> OpResponse:
        reservation = await self.limiter.acquire()
        task = asyncio.get_running_loop().create_task(self._apply(operation, reservation))
        self._singles.add(task)
        task.add_done_callback(self._singles.discard)
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.add_done_callback(_raise_exit)
            raise
        outcome = task.result()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def _apply(self, operation: Operation, reservation: Reservation) -> OpResponse | BaseException:
        """Apply *operation* under its permit; the error of a failed one is returned, as its caller may have gone."""
        counting = None if self._counts is None else self._counts[operation.kind]
        if counting is not None:
            counting.started += 1
        began = time.perf_counter()
        with reservation:
            outcome: OpResponse | BaseException
            try:
                outcome = await self._handler.apply(operation)
            except (KeyboardInterrupt, SystemExit) as error:
                outcome = error
            except BaseException as error:  # noqa: BLE001 - as in a stream, whatever it is belongs to this operation
                outcome = failure_of(operation.kind, error)
            if counting is not None:
                (counting.error if isinstance(outcome, BaseException) else counting.success).observe(
                    time.perf_counter() - began
                )
            return outcome


def _raise_exit(task: asyncio.Task[OpResponse | BaseException]) -> None:
    """Let ``KeyboardInterrupt`` and ``SystemExit`` of an operation whose caller has gone end the event loop's run."""
    if not task.cancelled() and isinstance(outcome := task.result(), KeyboardInterrupt | SystemExit):
        raise outcome
