"""The streaming executor: operations in, outcomes out, at most *window* between them, under one reservation.

One *execution* turns (index, operation or error) into (index, response or error), each exactly once:

1. **Pull.** One task, the *puller*, advances the input, and only while the consumer waits for an outcome and fewer than
   *window* items are pulled and not yet yielded. An error goes straight to the outcomes; an operation becomes *ready*.
   (Where the consumer stops waiting while the input itself is waited for, that one item still arrives.)
2. **Start.** *Runners* take ready operations in input order. One that does not suspend is followed by the next one in
   the same step of the same task: no task, no future, no object for it. A runner whose operation suspends calls up to
   two others, as many as there is something left to start for, so that runners double for as long as operations
   suspend; nothing that is ready ever waits for something suspended. Runners are made when needed, parked when idle and
   used again; the window bounds them.
3. **Finish.** Whatever an operation did becomes its outcome (:func:`consumer.handler.failure_of`), in order of
   completion, and the consumer is woken.
4. **Yield.** Only yielding frees a place in the window. When the consumer has half the window to itself, the puller is
   let in before the next outcome is handed over, so that storage is kept busy while outcomes are consumed.
5. **End.** Input over and everything yielded: the permits are released, then the output ends, with the exception the
   input raised, if it did.

**Served** (:meth:`StreamExecutor.serve`), what is pulled is at hand without waiting, and who takes the outcomes never
waits. Then a runner that has finished an operation hands its outcome over, takes the next item and starts that, all in
one step of its task. The puller only fills the window at first, and whenever the input has had nothing at hand. So an
operation that waits once costs one turn of the event loop instead of two, and nobody has to be called for it. Such an
execution ends at once with what its input or its output raises, whatever is still in flight and for however long.

**Stop** (``aclose``, or the output is forgotten): nothing more is pulled, nothing that waits for its turn begins, no
outcome is kept. Operations that were ready or running go on to their end; after the last one the permits come back.

**Turns**, for the ordering ``key``: a running operation that suspends holds the turn of its object. One on the same
object that becomes ready meanwhile waits in a chain, in input order, and in its place in the window; each passes the
turn on when it has finished. An operation that never suspends needs no turn.

**Cancelled.** Cancelling what an operation runs in gives ``OperationDropped`` for that index alone; the runner ends
when nothing is ready any more. ``KeyboardInterrupt`` and ``SystemExit``, or a defect of this module, stop the
execution; they are raised to the consumer once the permits are back (served: at once).

All of it belongs to one event loop. An operation sees a task that others have used before: what it sets in context
variables stays there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias

from consumer.errors import TierstreamError
from consumer.handler import Handler, Progress, failure_of, not_an_operation, with_key
from consumer.operations import Delete, Get, Head, Insert, Operation, OpResponse
from consumer.permits import Reservation

if TYPE_CHECKING:
    from consumer.metrics import OperationCounts  # it needs prometheus_client, which the executor does not

Ordering: TypeAlias = Literal["unordered", "key", "partition"]
Item: TypeAlias = tuple[int, Operation | Exception]
Outcome: TypeAlias = tuple[int, OpResponse | Exception]

ORDERINGS: Final = ("unordered", "key", "partition")

_OPERATIONS: Final = (Insert, Get, Delete, Head)
_CALLED_ON_SUSPENSION: Final = 2
"""Most runners called by one whose operation suspended: with 1, a window of n suspending operations would take n turns
of the event loop to start; with 2 it takes log2(n)."""

_Object: TypeAlias = str
"""An object by its storage path, which no two have in common: a string is hashed and compared faster than what it is
made of."""


async def _raising(error: BaseException) -> OpResponse:
    """Raise *error* when awaited."""
    raise error


def _wake(parked: asyncio.Future[None]) -> None:
    """Let whoever awaits *parked* go on; nothing where it has been cancelled."""
    if not parked.done():
        parked.set_result(None)


class _Running(Progress):
    """An operation that has begun and suspended."""

    __slots__ = ("index", "operation", "started")

    index: int

    def __init__(self, index: int, operation: Operation, started: float) -> None:
        self.attempts = 1  # as of any progress: one call less, for each operation
        self.last_error = None
        self.blocked = False
        self.index = index
        self.operation = operation
        self.started = started


@dataclass(frozen=True, slots=True)
class OldestOperation:
    """The operation of an execution that has been running longest."""

    index: int
    kind: str
    key: str | None
    age_seconds: float
    attempts: int
    """Attempts begun, the present one included."""
    last_error: TierstreamError | None
    """How the latest attempt that failed did so."""


class StreamExecutor:
    """Runs one stream of operations under one reservation; made by ``StorageService.stream``.

    Forgetting it un-run returns the permits, with a ``ResourceWarning``; ``async with`` returns them in order.

    Args:
        handler: Applies operations.
        reservation: The window: all its permits, fixed; this object becomes their owner.
        ordering: ``unordered``; ``key`` = operations on one object (context and key) run one after the other in input
            order and their outcomes are yielded in that order; ``partition`` = a reservation of one permit, so
            strictly one at a time.
        counts: Counts operations by kind; None counts nothing.

    Raises:
        ValueError: an unknown *ordering*.
    """

    def __init__(
        self,
        handler: Handler,
        reservation: Reservation,
        *,
        ordering: Ordering = "unordered",
        counts: Mapping[str, OperationCounts] | None = None,
    ) -> None:
        check_ordering(ordering)
        self.window: Final = reservation.permits
        """Most items pulled and not yet yielded; fixed."""
        self._handler = handler
        self._reservation = reservation
        self._by_key = ordering == "key"
        self._counts = counts
        self._loop: asyncio.AbstractEventLoop | None = None
        self._executed = False

        self._outstanding = 0
        """Items pulled and not yet yielded: at most the window."""
        self._ready: deque[tuple[int, Operation]] = deque()
        """Pulled, to be started, in input order."""
        self._turns: deque[tuple[_Object, tuple[int, Operation]]] = deque()
        """To be started first: each holds the turn of its object."""
        self._chains: dict[_Object, deque[tuple[int, Operation]] | None] = {}
        """For each object whose turn is held: the operations that wait for it, in input order; None until one does."""
        self._running: dict[_Running, None] = {}
        """Begun and suspended, in order of their start."""
        self._outcomes: deque[Outcome] = deque()
        """Finished, to be yielded."""

        self._puller: asyncio.Task[None] | None = None
        self._puller_parked: asyncio.Future[None] | None = None
        self._runners: set[asyncio.Task[None]] = set()
        self._runners_parked: list[asyncio.Future[None]] = []
        self._runners_called = 0
        """Parked or new ones on their way to what is ready: while anything is, there is one, or one in its step."""
        self._runners_new: set[asyncio.Task[None]] = set()
        """Those of them that have not had a step yet."""
        self._consumer: asyncio.Future[None] | None = None
        """What the consumer waits on while there is no outcome."""
        self._consuming = False
        """True while the consumer waits for an outcome; only then anything is pulled."""
        self._finish_waiters: list[asyncio.Future[None]] = []

        self._take: Callable[[], Item | None] | None = None
        """Where the execution is served: gives what the input has at hand."""
        self._deliver: Callable[[int, OpResponse | Exception], None] | None = None
        """Where the execution is served: takes an outcome."""
        self._dry = False
        """True where the input had nothing at hand, and the puller has to wait for it."""
        self._input_over = False
        self._input_error: BaseException | None = None
        self._fatal: BaseException | None = None
        """What stopped the execution from within; the consumer is told when the permits are back."""
        self._stopped = False
        """True once nothing more is pulled or yielded."""
        self._ended = False
        """True once the permits are back."""

    # ------------------------------------------------------------------------------------------ for its owner

    def execute(self, inputs: AsyncIterable[Item]) -> Outcomes:
        """Execute *inputs* and return their outcomes, an asynchronous iterator with ``aclose``; nothing begins yet.

        Every item gives one outcome, with the same index, in order of completion. Errors pass through unchanged; what
        is neither an operation nor an exception gives ``InvalidOperation``. An exception in one operation is the
        outcome of that one alone. What *inputs* itself raises is raised after all outcomes. *inputs* is advanced by one
        task, which is cancelled where it waits when the output is closed; closing it is its owner's.

        Raises:
            RuntimeError: executed before, or closed.
            TypeError: *inputs* is not asynchronously iterable.
        """
        self._check_unused()
        outcomes = Outcomes(self, aiter(inputs))
        self._executed = True
        return outcomes

    async def serve(
        self,
        take: Callable[[], Item | None],
        wait: Callable[[], Awaitable[bool]],
        deliver: Callable[[int, OpResponse | Exception], None],
    ) -> None:
        """Execute an input that says what it has at hand, for an output that never waits; return when it is over.

        As :meth:`execute`, for less: every item gives one outcome, which has left the window once it is delivered. Its
        input and output are parts of the service, so that what they raise is a defect, and is told at once: an
        operation that storage holds up may be in flight for hours.

        Args:
            take: Returns the next item, or None where something has to be waited for first, or the input is over.
            wait: Waits for that. Called after *take* has returned None, and before it is called again; returns False
                where the input is over. Cancelled where it waits when the execution is stopped.
            deliver: Takes one outcome.

        Raises:
            RuntimeError: executed before, or closed.
            BaseException: what *take*, *wait* or *deliver* raised; as after :meth:`aclose`, operations in flight go on.

        Cancellation: as :meth:`aclose`; operations in flight go on.
        """
        self._check_unused()
        self._executed = True
        self._take, self._deliver = take, deliver
        self._loop = asyncio.get_running_loop()
        self._puller = self._loop.create_task(self._pull(partial(self._fill, take, wait)))
        try:
            while not self._is_over():
                self._consumer = self._loop.create_future()
                await self._consumer
            self._end()
        finally:
            self._consumer = None
            self._stop()

    def _check_unused(self) -> None:
        if self._executed:
            raise RuntimeError("an executor executes once")
        if self._stopped:
            raise RuntimeError("the executor is closed")

    async def aclose(self) -> None:
        """Stop pulling at once and return without waiting; the permits come back after the last operation in flight.

        Never run: they come back now. Calling it again does nothing.
        """
        self._stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def in_flight(self) -> int:
        """Operations running now; those that wait for their turn are not among them."""
        return len(self._running)

    def oldest(self) -> OldestOperation | None:
        """Return the operation that has been running longest, None where none runs."""
        running = next(iter(self._running), None)
        if running is None:
            return None
        return OldestOperation(
            index=running.index,
            kind=running.operation.kind,
            key=running.operation.key,
            age_seconds=time.monotonic() - running.started,
            attempts=running.attempts,
            last_error=running.last_error,
        )

    def index_in(self, task: asyncio.Task[Any] | None) -> int | None:
        """Return the index of the operation that *task* runs, None where it runs none that has suspended."""
        return next((running.index for running in self._running if getattr(running, "task", None) is task), None)

    def shrink_to_running(self) -> None:
        """Give back the permits beyond those of the operations that still run; for a drain deadline, after ``aclose``.

        The rest comes back together, after the last of these.

        Raises:
            RuntimeError: not closed, so that more operations may begin.
        """
        if not self._stopped:
            raise RuntimeError("the executor is not closed")
        self._reservation.shrink(len(self._running) + len(self._ready) + len(self._turns))

    async def wait_finished(self) -> None:
        """Wait until no operation is in flight.

        Cancellation: leaves nothing behind.
        """
        while self._running or self._ready or self._turns:
            waiter = asyncio.get_running_loop().create_future()
            self._finish_waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._finish_waiters:
                    self._finish_waiters.remove(waiter)

    # ------------------------------------------------------------------------------------------ consumer

    async def _next_outcome(self, _output: Outcomes, inputs: AsyncIterator[Item]) -> Outcome:
        """Return the next outcome, pulling *inputs* while waiting for it; until then *_output* is not forgotten."""
        outcomes = self._outcomes
        # Usually more than half of the window is in use, or the puller has nothing to do: nothing to wait for.
        if not outcomes or (self._puller_parked is not None and self._outstanding * 2 <= self.window):
            await self._pull_and_wait(inputs)
        self._outstanding -= 1
        return outcomes.popleft()

    async def _pull_and_wait(self, inputs: AsyncIterator[Item]) -> None:
        """Let the puller in; return when there is an outcome to be yielded, raise when there will be none."""
        if self._consuming:
            raise RuntimeError("the output is already being waited for")
        self._consuming = True
        try:
            if self._puller is None and not self._stopped:
                self._loop = asyncio.get_running_loop()
                self._puller = self._loop.create_task(self._pull(partial(self._pull_all, inputs)))
            else:
                self._call_puller()
            if self._outcomes:
                # Callbacks run in the order they were registered in, so the puller has its turn before this goes on.
                await asyncio.sleep(0)
            while not self._outcomes:
                if self._is_over():
                    self._end()
                    raise StopAsyncIteration
                self._consumer = asyncio.get_running_loop().create_future()
                await self._consumer
        finally:
            self._consuming = False
            self._consumer = None

    def _is_over(self) -> bool:
        if self._deliver is not None and (self._fatal is not None or self._input_error is not None):
            return True
        if self._fatal is not None:
            return self._ended
        return self._stopped or (self._input_over and self._outstanding == 0)

    def _end(self) -> None:
        """Release the permits; raise what the execution ended with, if it was anything."""
        error = self._fatal
        self._fatal = None
        if not self._stopped:
            error = self._input_error
            self._stop()
        if error is not None:
            raise error

    def _call_consumer(self) -> None:
        if self._consumer is not None:
            _wake(self._consumer)
            self._consumer = None

    # ------------------------------------------------------------------------------------------ puller

    async def _pull(self, pulling: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do *pulling*, which ends with the input."""
        try:
            await pulling()
        except StopAsyncIteration:
            pass
        except BaseException as error:
            if isinstance(error, GeneratorExit) and not self._is_in_its_step():
                raise
            if not self._stopped:  # raised to the consumer, after the outcomes
                self._input_error = error
        self._input_over = True
        self._puller_parked = None
        self._call_consumer()

    async def _pull_all(self, inputs: AsyncIterator[tuple[int, object]]) -> None:
        """Advance the input whenever the consumer waits and the window has room, until it ends."""
        pull, ready, outcomes, window = inputs.__anext__, self._ready, self._outcomes, self.window
        while True:
            while self._consuming and self._outstanding < window:
                index, thing = await pull()
                if self._stopped:
                    return
                self._outstanding += 1
                if isinstance(thing, _OPERATIONS):
                    ready.append((index, with_key(thing)))
                    if not self._runners_called:
                        self._call_runner()
                else:
                    outcomes.append((index, _failed(thing)))
                    self._call_consumer()
            self._puller_parked = asyncio.get_running_loop().create_future()
            await self._puller_parked

    async def _fill(
        self, take: Callable[[], tuple[int, object] | None], wait: Callable[[], Awaitable[bool]]
    ) -> None:
        """Fill the window with what the input has at hand, waiting for it where it has nothing, until it ends."""
        ready, deliver, window = self._ready, self._deliver, self.window
        assert deliver is not None
        steps = window
        while True:
            while self._outstanding < window:
                item = None if self._dry else take()
                if item is None:
                    self._dry = False
                    if not await wait():
                        return
                    if self._stopped:
                        return
                    continue
                index, thing = item
                if isinstance(thing, _OPERATIONS):
                    self._outstanding += 1
                    ready.append((index, with_key(thing)))
                    if not self._runners_called:
                        self._call_runner()
                else:
                    deliver(index, _failed(thing))
                    steps -= 1
                    if not steps:  # nothing but errors: others have their turn too
                        steps = window
                        await asyncio.sleep(0)
            self._puller_parked = asyncio.get_running_loop().create_future()
            await self._puller_parked

    def _call_puller(self) -> None:
        """Let the puller go on, where it is parked and the window has room."""
        if self._puller_parked is not None and self._outstanding < self.window:
            _wake(self._puller_parked)
            self._puller_parked = None

    # ------------------------------------------------------------------------------------------ runners

    def _call_runner(self) -> None:
        """Have a parked runner look for operations, or a new one where the window allows."""
        while self._runners_parked:
            parked = self._runners_parked.pop()
            if self._call(parked):
                return
        if len(self._runners) < self.window:
            # Not by the loop's task factory: an eager one would start operations inside the step of another one.
            runner = asyncio.Task(self._run(), loop=asyncio.get_running_loop())
            self._runners_called += 1
            self._runners.add(runner)
            self._runners_new.add(runner)
            runner.add_done_callback(self._runner_left)

    def _call(self, parked: asyncio.Future[None]) -> bool:
        """Let a parked runner go on; False where it has been cancelled before."""
        if parked.done():
            return False
        self._runners_called += 1
        parked.set_result(None)
        return True

    def _call_runners(self) -> None:
        """One operation has suspended: call runners for what is left to start."""
        wanted = len(self._ready) + len(self._turns) - self._runners_called
        for _ in range(min(wanted, _CALLED_ON_SUSPENSION)):
            self._call_runner()

    def _runner_left(self, runner: asyncio.Task[None]) -> None:
        """Pass on what a runner was called for; by then it has ended, or been cancelled before it began."""
        self._runners.discard(runner)
        if runner in self._runners_new:
            self._runners_new.remove(runner)
            self._runners_called -= 1
        if self._ready or self._turns:
            self._call_runner()
        else:
            self._nothing_ready()
            if self._take is not None:
                self._call_puller()

    async def _run(self) -> None:
        """Run what is ready, park while nothing is, until the execution has ended."""
        task = asyncio.current_task()
        assert task is not None
        create_future, parked_runners = task.get_loop().create_future, self._runners_parked
        self._runners_new.remove(task)
        self._runners_called -= 1
        try:
            while not self._ended:
                # A coroutine of its own: a parked runner must not keep the last operation, and its payload, alive.
                await self._run_ready(task)
                if task.cancelling():
                    break
                if not self._ended:
                    parked = create_future()
                    parked_runners.append(parked)
                    try:
                        await parked
                    finally:
                        if parked.done() and not parked.cancelled():  # else it was not called
                            self._runners_called -= 1
        except (asyncio.CancelledError, GeneratorExit):  # while parked, or the event loop is gone
            raise
        except BaseException as error:
            told = self._fatal is not None or not self._stopped
            self._fatal = error
            self._stop()
            self._ready.clear()
            self._turns.clear()
            if not told:  # there is no consumer any more
                raise

    async def _run_ready(self, task: asyncio.Task[None]) -> None:  # noqa: C901, PLR0912, PLR0915 - the hot path: calls cost most
        """Run operations in *task*, the current one, until nothing is ready."""
        ready, turns, chains, outcomes = self._ready, self._turns, self._chains, self._outcomes
        handler, counts, all_running, clock = self._handler, self._counts, self._running, time.monotonic
        take, deliver, window = self._take, self._deliver, self.window
        steps = window
        """Items still to be taken before others have their turn too, where no operation suspends."""
        key: _Object | None
        outcome: OpResponse | TierstreamError
        rest: Awaitable[OpResponse]
        running: _Running | None = None
        while True:
            if turns:
                key, (index, operation) = turns.popleft()
            else:
                key = None
                if ready:
                    index, operation = ready.popleft()
                elif (
                    take is None
                    or deliver is None  # both, or neither
                    or self._puller_parked is None
                    or self._outstanding >= window
                    or self._stopped
                ):
                    self._nothing_ready()
                    return
                elif not steps:
                    steps = window
                    await asyncio.sleep(0)
                    continue
                elif (item := take()) is None:
                    self._dry = True
                    self._call_puller()
                    self._nothing_ready()
                    return
                else:
                    steps -= 1
                    index, thing = item
                    if not isinstance(thing, _OPERATIONS):
                        deliver(index, _failed(thing))
                        continue
                    self._outstanding += 1
                    operation = with_key(thing)
                if chains:
                    try:
                        path = f"{operation.context.storage_prefix}{operation.key}"
                    except AttributeError:  # it has no context: nothing of it will reach storage
                        path = ""
                    if path in chains:
                        waiting = chains[path]
                        if waiting is None:
                            waiting = chains[path] = deque()
                        waiting.append((index, operation))
                        continue
            began = clock()
            if counts is not None:
                counts[operation.kind].started += 1
            attempt = handler.attempt(operation)
            try:
                awaited = attempt.send(None)
            except StopIteration as done:
                outcome = done.value
            except BaseException as error:  # noqa: BLE001 - raised again below, where it becomes the outcome
                running = _Running(index, operation, began)
                rest = handler.finish(operation, _raising(error), running)
            else:
                running = _Running(index, operation, began)
                rest = handler.resume(operation, attempt, awaited, running, task)
            if running is not None:
                if self._by_key and key is None:
                    key = f"{operation.context.storage_prefix}{operation.key}"
                    chains[key] = None
                all_running[running] = None
                steps = window
                if ready or turns:  # others start meanwhile
                    self._call_runners()
                elif take is not None and self._outstanding < window:
                    self._call_puller()
                try:
                    outcome = await rest
                except (KeyboardInterrupt, SystemExit):  # no outcome
                    raise
                except BaseException as error:
                    if isinstance(error, GeneratorExit) and not self._is_in_its_step():
                        raise
                    outcome = failure_of(operation.kind, error)  # it is that of this operation alone
                finally:
                    del all_running[running]
                    running = None
            if key is not None:
                self._pass_turn(key)
            if counts is not None:
                counting = counts[operation.kind]
                distribution = counting.error if isinstance(outcome, Exception) else counting.success
                ended = clock()
                distribution.observe_of_record(ended - began, ended, index)
            if self._stopped:
                continue
            if deliver is None:
                outcomes.append((index, outcome))
                if self._consumer is not None:
                    self._call_consumer()
                continue
            self._outstanding -= 1
            deliver(index, outcome)
            if self._input_over and not self._outstanding:
                self._call_consumer()

    def _is_in_its_step(self) -> bool:
        """Tell whether a task of this execution runs now.

        If not, a ``GeneratorExit`` is not somebody's error: the event loop is gone, and the coroutine is being closed.
        """
        if asyncio._get_running_loop() is None:  # noqa: SLF001 - documented; unlike get_running_loop it does not raise
            return False
        task = asyncio.current_task()
        return task is not None and (task is self._puller or task in self._runners)

    def _pass_turn(self, key: _Object) -> None:
        """Give the turn of an object to the operation that waits for it longest."""
        waiting = self._chains[key]
        if waiting and not self._stopped:
            self._turns.append((key, waiting.popleft()))
        else:
            del self._chains[key]

    # ------------------------------------------------------------------------------------------ end

    def _stop(self) -> None:
        """Pull, yield and begin nothing more; the permits come back when nothing runs."""
        if self._stopped:
            return
        self._stopped = True
        self._outcomes.clear()
        if self._puller is not None:
            self._puller.cancel()
        self._call_consumer()
        if not self._ready and not self._turns:
            self._nothing_ready()

    def _nothing_ready(self) -> None:
        """Where nothing runs either: tell those who wait for it; once stopped, release the permits, end the runners."""
        if self._running:
            return
        for waiter in self._finish_waiters:
            _wake(waiter)
        self._finish_waiters.clear()
        if not self._stopped:
            return
        self._ended = True
        self._reservation.release()
        for parked in self._runners_parked:
            self._call(parked)
        self._runners_parked.clear()
        self._call_consumer()

    def _forget(self) -> None:
        """Stop, called by the garbage collector: on any thread, with or without an event loop."""
        loop = self._loop
        if self._stopped:
            return
        if loop is None or asyncio._get_running_loop() is loop:  # noqa: SLF001 - documented; it does not raise
            self._stop()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(self._stop)
        else:
            self._stopped = True
            self._reservation.release()


class Outcomes:
    """The consumer's end of an execution. Nothing of the execution refers to it, so that forgetting it is noticed."""

    __slots__ = ("_executor", "_inputs")

    def __init__(self, executor: StreamExecutor, inputs: AsyncIterator[Item]) -> None:
        self._executor = executor
        self._inputs = inputs

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Outcome]:
        """Return the next outcome.

        Raises:
            RuntimeError: somebody else waits for it.
            BaseException: what the input raised, after all outcomes.

        Cancellation: loses no outcome; operations in flight go on.
        """
        return self._executor._next_outcome(self, self._inputs)  # noqa: SLF001 - the executor's own other end

    async def aclose(self) -> None:
        """As :meth:`StreamExecutor.aclose`."""
        await self._executor.aclose()

    def __del__(self) -> None:
        self._executor._forget()  # noqa: SLF001 - the executor's own other end


def _failed(thing: object) -> Exception:
    """Return the outcome of an item that is no operation."""
    return thing if isinstance(thing, Exception) else not_an_operation(thing)


def check_ordering(ordering: str) -> None:
    """Check the name of an ordering.

    Raises:
        ValueError: it is none of :data:`ORDERINGS`.
    """
    if ordering not in ORDERINGS:
        raise ValueError(f"ordering is one of {', '.join(ORDERINGS)}, not {ordering!r}")
