"""One operation is checked, executed, answered; tried again where that helps, and never left running."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from consumer.errors import (
    AtCapacity,
    BackendError,
    BackendUnavailable,
    InvalidMetadata,
    InvalidOperation,
    OperationDropped,
    OperationPanic,
    OperationTimeout,
    ReferenceFailure,
    TierstreamError,
    TooLarge,
)
from consumer.handler import Handler, Progress, failure_of, not_an_operation, with_key
from consumer.ids import ObjectId
from consumer.log import Event
from consumer.operations import (
    Delete,
    Deleted,
    Get,
    Got,
    Headed,
    Insert,
    Inserted,
    Metadata,
    Operation,
    OpResponse,
    PayloadReference,
    Position,
    StoredObject,
    TimeToLive,
)
from consumer.retry import RetryPolicy
from consumer.storage.backend import Payload
from gates import CONTEXT, GatedStorage, delete, get, head, insert, settled

REFERENCE = PayloadReference("file:///srv/uploads/a", size=7)


class FlakyStorage(GatedStorage):
    """Fails the first *times* calls with an error each, then works."""

    def __init__(self, times: int, error: Callable[[], BaseException] = BackendUnavailable) -> None:
        super().__init__()
        self.times = times
        self.error = error

    async def _call(self, method: str, object_id: ObjectId) -> None:
        await super()._call(method, object_id)
        if self.times > 0:
            self.times -= 1
            error = self.error()
            raise error


class Chunks:
    """An opened payload that knows whether it has been closed."""

    def __init__(self, *chunks: bytes | Exception) -> None:
        self.chunks = chunks
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def aclose(self) -> None:
        self.closed = True


class Opened:
    """References that open to what they are given, one after the other."""

    def __init__(self, *payloads: Payload | TierstreamError) -> None:
        self.payloads = list(payloads)
        self.asked: list[PayloadReference] = []

    async def open(self, reference: PayloadReference) -> Payload:
        self.asked.append(reference)
        payload = self.payloads.pop(0)
        if isinstance(payload, TierstreamError):
            raise payload
        return payload


class Waits:
    """Waits between attempts that take no time, and are written down."""

    def __init__(self, *, held: bool = False) -> None:
        self.seconds: list[float] = []
        self.gate = asyncio.Event()
        if not held:
            self.gate.set()

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await self.gate.wait()


class AsInAStream(Handler):
    """Applies an operation in the two ways a stream does: its first step by hand, and then the rest of it, if any."""

    async def apply(self, operation: Operation, progress: Progress | None = None) -> OpResponse:
        operation = with_key(operation)
        progress = Progress() if progress is None else progress
        attempt = self.attempt(operation)
        task = asyncio.current_task()
        assert task is not None
        try:
            awaited = attempt.send(None)
        except StopIteration as done:
            return cast("OpResponse", done.value)
        except Exception as error:  # noqa: BLE001 - raised again, where it becomes the outcome
            return await self.finish(operation, _raising(error), progress)
        return await self.resume(operation, attempt, awaited, progress, task)


async def _raising(error: Exception) -> OpResponse:
    raise error


MADE: type[Handler] = Handler
"""What :func:`handler` makes."""


@pytest.fixture(autouse=True, params=[Handler, AsInAStream], ids=["alone", "in-a-stream"])
def _made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds for a single operation and for one of a stream."""
    monkeypatch.setitem(globals(), "MADE", request.param)


def handler(storage: GatedStorage, **more: Any) -> Handler:
    """Make a handler whose waits are as long as they can be and take no time."""
    settings: dict[str, Any] = {"sleep": Waits(), "jitter": lambda: 1.0, **more}
    return MADE(storage, **settings)


class TestOnce:
    """A single attempt."""

    async def test_each_kind_makes_its_call_and_its_response(self) -> None:
        """EXE-18, OP-5 … OP-8."""
        storage = GatedStorage()
        apply = handler(storage).apply

        assert await apply(insert("k", b"1")) == Inserted(ObjectId(CONTEXT, "k"), Metadata())
        assert await apply(get("k")) == Got("k", StoredObject(Metadata(), b"1"))
        assert await apply(head("k")) == Headed("k", Metadata())
        assert await apply(delete("k")) == Deleted("k")
        assert await apply(get("k")) == Got("k", None)
        assert await apply(head("k")) == Headed("k", None)
        assert await apply(delete("k")) == Deleted("k")
        assert [method for method, _ in storage.calls] == ["put", "get", "head", "delete", "get", "head", "delete"]

    async def test_a_keyless_insert_gets_a_random_key(self) -> None:
        """OP-12: UUIDv4; all other operations stay as they are."""
        storage = GatedStorage()

        inserted = await handler(storage).apply(insert(None))

        assert isinstance(inserted, Inserted)
        assert (len(inserted.key), inserted.key[14]) == (36, "4")
        for operation in (insert("k"), get("k"), delete("k"), head("k")):
            assert with_key(operation) is operation

    @pytest.mark.parametrize(
        ("operation", "error"),
        [
            (Insert(CONTEXT, "k", Metadata(compression="gzip"), b""), InvalidMetadata),
            (Insert(CONTEXT, "k", Metadata(expiration=TimeToLive(0)), b""), InvalidMetadata),
            (Insert(CONTEXT, "", Metadata(), b""), InvalidOperation),
            (Insert(CONTEXT, "k", Metadata(), "text"), InvalidOperation),  # type: ignore[arg-type]
            (Get(CONTEXT, "a\x00"), InvalidOperation),
            (head("k" * 900), InvalidOperation),
            (delete(""), InvalidOperation),
            ("get", InvalidOperation),
        ],
    )
    async def test_a_broken_rule_never_reaches_storage(self, operation: Any, error: type[TierstreamError]) -> None:
        """Contract 10: the error class is the same wherever it is found."""
        storage = GatedStorage()

        with pytest.raises(error):
            await handler(storage, retry=RetryPolicy()).apply(operation)

        assert storage.calls == []

    async def test_an_inline_payload_has_its_largest_size(self) -> None:
        """Contract 2.2, ``payload_too_large``: to the byte."""
        storage = GatedStorage()
        limited = handler(storage, object_bytes_max=3)

        await limited.apply(insert("k", b"123"))
        with pytest.raises(TooLarge, match="at most 3 bytes"):
            await limited.apply(insert("k", b"1234"))
        assert len(storage.calls) == 1

    async def test_a_position_goes_to_storage_and_is_not_asked_of_one_without(self) -> None:
        """Contract 10: storage is anything with put, get, head, delete; only what comes from Kafka has a position."""

        class Fenced:
            def __init__(self) -> None:
                self.given: list[tuple[Any, ...]] = []

            async def put(self, *given: Any) -> Metadata:
                self.given.append(given[3:])
                return Metadata()

            async def delete(self, *given: Any) -> None:
                self.given.append(given[1:])

        storage, position = Fenced(), Position("log", 7)
        applied = handler(cast("Any", storage), references=Opened(b"whole", b"whole"))
        for at in (position, None):
            await applied.apply(Insert(CONTEXT, "k", Metadata(), b"x", at))
            await applied.apply(Insert(CONTEXT, None, Metadata(), b"x", at))
            await applied.apply(Insert(CONTEXT, "k", Metadata(), REFERENCE, at))
            await applied.apply(Delete(CONTEXT, "k", at))

        assert storage.given == [(position,)] * 4 + [()] * 4

    async def test_references_are_refused_where_there_are_none(self) -> None:
        """Contract 2.2, ``reference_denied``."""
        storage = GatedStorage()

        with pytest.raises(ReferenceFailure) as raised:
            await handler(storage).apply(Insert(CONTEXT, "k", Metadata(), REFERENCE))

        assert raised.value.code == "reference_denied"
        assert storage.calls == []

    async def test_a_reference_is_opened_stored_and_closed(self) -> None:
        """Contract 2.1, claim check."""
        storage, chunks = GatedStorage(), Chunks(b"pay", b"load")
        references = Opened(chunks)

        await handler(storage, references=references).apply(Insert(CONTEXT, "k", Metadata(), REFERENCE))

        assert storage.objects["testing/objects/k"].payload == b"payload"
        assert references.asked == [REFERENCE]
        assert chunks.closed

    async def test_a_reference_may_open_to_bytes(self) -> None:
        """What is small need not be a stream."""
        storage = GatedStorage()

        await handler(storage, references=Opened(b"whole")).apply(Insert(CONTEXT, "k", Metadata(), REFERENCE))

        assert storage.objects["testing/objects/k"].payload == b"whole"

    async def test_a_reference_that_fails_is_the_clients_fault_and_closed(self) -> None:
        """ERR-3: told from a fault of storage, in the middle of the payload too."""
        storage, chunks = GatedStorage(), Chunks(b"pay", ReferenceFailure("cut", code="reference_mismatch"))
        by_reference = Insert(CONTEXT, "k", Metadata(), REFERENCE)

        with pytest.raises(ReferenceFailure) as raised:
            await handler(storage, references=Opened(chunks), retry=RetryPolicy()).apply(by_reference)
        assert raised.value.code == "reference_mismatch"
        assert chunks.closed
        assert storage.objects == {}

        with pytest.raises(ReferenceFailure):
            await handler(storage, references=Opened(ReferenceFailure("gone"))).apply(by_reference)
        assert len(storage.calls) == 1

    async def test_without_a_policy_nothing_is_tried_again(self) -> None:
        """Contract 10: the plain API makes one attempt."""
        storage = FlakyStorage(1)

        with pytest.raises(BackendUnavailable):
            await handler(storage).apply(head("k"))

        assert len(storage.calls) == 1


class TestAgain:
    """The attempts after the first one."""

    async def test_a_passing_fault_is_passed_by(self) -> None:
        """Contract 6, ``retry``: the waits double; progress tells how it went."""
        storage, waits, progress = FlakyStorage(2), Waits(), Progress()

        answer = await handler(storage, retry=RetryPolicy(), sleep=waits).apply(head("k"), progress)

        assert answer == Headed("k", None)
        assert waits.seconds == pytest.approx([0.1, 0.2])
        assert (progress.attempts, progress.blocked) == (3, False)
        assert isinstance(progress.last_error, BackendUnavailable)

    @pytest.mark.parametrize("error", [BackendError, ValueError, asyncio.CancelledError, OperationPanic])
    async def test_what_is_not_retriable_is_raised_at_once(self, error: type[BaseException]) -> None:
        """The error says so itself; what is not ours says nothing."""
        storage = FlakyStorage(1, error)

        with pytest.raises(error):
            await handler(storage, retry=RetryPolicy()).apply(head("k"))

        assert len(storage.calls) == 1

    async def test_what_is_not_retriable_ends_it_later_too(self) -> None:
        """A passing fault may be followed by a permanent one."""
        errors = iter([BackendUnavailable("away"), BackendError("broken")])
        storage = FlakyStorage(2, lambda: next(errors))

        with pytest.raises(BackendError):
            await handler(storage, retry=RetryPolicy()).apply(head("k"))

        assert len(storage.calls) == 2

    async def test_a_keyless_insert_keeps_its_key(self) -> None:
        """K-7: an attempt whose answer was lost must not leave a second object."""
        storage = FlakyStorage(2)

        inserted = await handler(storage, retry=RetryPolicy()).apply(insert(None))

        assert isinstance(inserted, Inserted)
        assert {key for _, key in storage.calls} == {inserted.key}

    async def test_a_reference_is_opened_anew(self) -> None:
        """Chunks are read once."""
        storage, first, second = FlakyStorage(1), Chunks(b"old"), Chunks(b"new")

        await handler(storage, retry=RetryPolicy(), references=Opened(first, second)).apply(
            Insert(CONTEXT, "k", Metadata(), REFERENCE)
        )

        assert storage.objects["testing/objects/k"].payload == b"new"
        assert first.closed
        assert second.closed

    @pytest.mark.parametrize("attempts", [1, 2, 5])
    async def test_attempts_used_up_answer_where_that_is_wanted(self, attempts: int) -> None:
        """Contract 2.2: ``backend_unavailable``, with ``retry.exhausted: answer``."""
        storage, waits = FlakyStorage(100), Waits()
        policy = RetryPolicy(attempts, exhausted="answer")

        with pytest.raises(BackendUnavailable):
            await handler(storage, retry=policy, sleep=waits).apply(head("k"))

        assert (len(storage.calls), len(waits.seconds)) == (attempts, attempts - 1)

    async def test_attempts_used_up_block_by_default(self, caplog: pytest.LogCaptureFixture) -> None:
        """Contract 6: go on trying, and say so, when the first one blocks and when none does any more."""
        storage, waits, said = FlakyStorage(10), Waits(held=True), list[bool]()
        blocking = handler(storage, retry=RetryPolicy(2, 1.0, 4.0), sleep=waits, on_blocked=said.append)
        progress = Progress()
        operations = blocking.apply(head("a"), progress), blocking.apply(get("b"))
        tasks = [asyncio.create_task(operation) for operation in operations]
        await settled()
        assert (blocking.blocked, said) == (0, [])

        waits.gate.set()
        waits.gate.clear()
        await settled()
        assert (blocking.blocked, said, progress.blocked) == (2, [True], True)
        assert caplog.text.count("storage unavailable") == 1

        waits.gate.set()
        assert await asyncio.gather(*tasks) == [Headed("a", None), Got("b", None)]
        assert (blocking.blocked, said, progress.blocked) == (0, [True, False], False)
        assert max(waits.seconds) == 4.0
        assert progress.attempts > 2

    async def test_a_blocked_operation_that_is_cancelled_blocks_no_more(self) -> None:
        """And makes no further attempt."""
        storage, waits, said = FlakyStorage(100), Waits(held=True), list[bool]()
        blocking = handler(storage, retry=RetryPolicy(1), sleep=waits, on_blocked=said.append)
        task = asyncio.create_task(blocking.apply(head("a")))
        await settled()
        assert blocking.blocked == 1

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (blocking.blocked, said, len(storage.calls)) == (0, [True, False], 1)

    async def test_a_blocked_operation_that_fails_for_good_blocks_no_more(self) -> None:
        """Its partition goes on with the next record."""
        errors = iter([BackendUnavailable("away"), BackendUnavailable("away"), BackendError("broken")])
        said = list[bool]()
        blocking = handler(
            FlakyStorage(3, lambda: next(errors)), retry=RetryPolicy(1), on_blocked=said.append, sleep=Waits()
        )

        with pytest.raises(BackendError):
            await blocking.apply(head("a"))
        assert (blocking.blocked, said) == (0, [True, False])


class StubbornStorage(GatedStorage):
    """Does not end when it is cancelled, but when the key is let go; then it has an answer after all, or not."""

    def __init__(self, key: str, *, answers: bool) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.key = key
        self.answers = answers
        self.cancelled = asyncio.Event()

    async def head(self, object_id: ObjectId) -> Metadata | None:
        if object_id.key == self.key and not self.cancelled.is_set():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                await self.gate.wait()
                if not self.answers:
                    raise
        return await super().head(object_id)


class TestTooLate:
    """An attempt and its time limit."""

    async def test_an_attempt_that_takes_too_long_is_tried_again(self) -> None:
        """Contract 6, ``retry.attempt_timeout``: a timeout is retriable."""
        storage, progress = StubbornStorage("k", answers=False), Progress()
        storage.gate.set()
        policy = RetryPolicy(2, exhausted="answer", attempt_timeout_seconds=0.001)

        assert await handler(storage, retry=policy).apply(head("k"), progress) == Headed("k", None)
        assert isinstance(progress.last_error, OperationTimeout)

    async def test_the_last_attempt_that_takes_too_long_is_a_timeout(self) -> None:
        """Contract 2.2: ``timeout``, 504, with ``retry.exhausted: answer``."""
        storage = GatedStorage("k")
        policy = RetryPolicy(2, exhausted="answer", attempt_timeout_seconds=0.001)

        with pytest.raises(OperationTimeout, match=r"within 0\.001 seconds"):
            await handler(storage, retry=policy).apply(head("k"))

        assert len(storage.calls) == len(storage.ended) == 2

    async def test_an_attempt_is_not_over_before_its_work_is(self) -> None:
        """Contract 2.2: permit and turn are held until the work has really ended; no second attempt runs beside it."""
        storage = StubbornStorage("k", answers=False)
        policy = RetryPolicy(3, exhausted="answer", attempt_timeout_seconds=0.001)
        task = asyncio.create_task(handler(storage, retry=policy).apply(head("k")))

        await storage.cancelled.wait()
        await settled()
        assert not task.done()
        assert storage.calls == []
        storage.gate.set()
        assert await task == Headed("k", None)
        assert len(storage.calls) == 1

    async def test_an_attempt_that_answers_after_all_has_answered(self) -> None:
        """Late is better than again."""
        storage = StubbornStorage("k", answers=True)
        storage.gate.set()
        policy = RetryPolicy(1, exhausted="answer", attempt_timeout_seconds=0.001)

        assert await handler(storage, retry=policy).apply(head("k")) == Headed("k", None)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    async def test_a_timeout_of_storages_own_is_what_it_is(self) -> None:
        """Not ours, so nothing we know to be retriable."""
        storage = FlakyStorage(1, TimeoutError)

        with pytest.raises(TimeoutError):
            await handler(storage, retry=RetryPolicy()).apply(head("k"))

        assert len(storage.calls) == 1

    async def test_without_a_limit_an_attempt_may_take_for_ever(self) -> None:
        """``attempt_timeout_seconds=None``."""
        storage = GatedStorage("k")
        task = asyncio.create_task(
            handler(storage, retry=RetryPolicy(attempt_timeout_seconds=None)).apply(head("k"))
        )
        await settled()
        assert not task.done()
        storage.let_go("k")
        assert await task == Headed("k", None)

    async def test_cancelling_is_not_a_timeout(self) -> None:
        """Whoever cancels gets what they asked for, within the limit as well."""
        storage = GatedStorage("k")
        task = asyncio.create_task(handler(storage, retry=RetryPolicy()).apply(head("k")))
        await settled()

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(storage.calls) == len(storage.ended) == 1


    async def test_many_limits_run_out_each_on_its_own(self) -> None:
        """One timer serves them all: what began earlier or ended meanwhile changes nothing for the others."""
        storage = GatedStorage("a", "b", "c")
        policy = RetryPolicy(1, exhausted="answer", attempt_timeout_seconds=0.02)
        ours = handler(storage, retry=policy)
        tasks = {}
        for key in "abc":
            tasks[key] = asyncio.create_task(ours.apply(head(key)))
            await settled()
        storage.let_go("b")

        assert await tasks["b"] == Headed("b", None)
        for key in "ac":
            with pytest.raises(OperationTimeout):
                await tasks[key]
        storage.let_go("a")
        assert await ours.apply(head("a")) == Headed("a", None)  # and with nothing left a later one has its limit too
        with pytest.raises(OperationTimeout):
            await ours.apply(head("c"))

    async def test_storage_that_outlives_a_cancellation_and_waits_on_is_waited_for(self) -> None:
        """The cancellation that a limit is arrives in storage, which may have more than one thing to put in order."""
        storage = StubbornStorage("k", answers=True)
        policy = RetryPolicy(1, exhausted="answer", attempt_timeout_seconds=0.001)
        task = asyncio.create_task(handler(storage, retry=policy).apply(head("k")))
        await storage.cancelled.wait()
        await settled()
        assert not task.done()
        storage.gate.set()

        assert await task == Headed("k", None)

    async def test_cancelled_and_too_late_at_once_is_cancelled(self) -> None:
        """Who cancelled is waiting for that, whatever the limit says."""
        storage = StubbornStorage("k", answers=False)
        policy = RetryPolicy(1, exhausted="answer", attempt_timeout_seconds=0.001)
        task = asyncio.create_task(handler(storage, retry=policy).apply(head("k")))
        await storage.cancelled.wait()
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task


class TestFailureOf:
    """What an operation raised, as the error of its outcome."""

    @pytest.mark.parametrize(
        ("error", "kind", "level"),
        [
            (InvalidOperation("bad key"), InvalidOperation, logging.DEBUG),
            (AtCapacity("full"), AtCapacity, logging.WARNING),
            (BackendError("broken"), BackendError, logging.ERROR),
            (ValueError("oops"), OperationPanic, logging.ERROR),
            (asyncio.CancelledError(), OperationDropped, logging.ERROR),
        ],
    )
    def test_is_one_of_ours_and_logged_once(
        self, error: BaseException, kind: type[TierstreamError], level: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """ERR-2, ERR-4, EXE-11, EXE-13: one line, with the kind of operation, at the level of the error."""
        with caplog.at_level(logging.DEBUG, "consumer"):
            failure = failure_of("insert", error)

        assert type(failure) is kind
        assert failure is error or failure.__cause__ is error
        (record,) = caplog.records
        line = record.msg
        assert isinstance(line, Event)
        assert record.levelno == level
        assert line.fields == {"kind": "insert", "code": failure.code, "error": str(failure)}

    def test_of_something_else_names_its_type_only(self) -> None:
        """Contract 2.2: messages show no payload."""
        assert str(not_an_operation(b"secret")) == "not an operation: bytes"
