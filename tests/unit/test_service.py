"""One limiter in front of one storage: streams reserve a window, single operations take one permit each."""

from __future__ import annotations

import asyncio
import logging
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

import consumer
from consumer.errors import (
    AtCapacity,
    BackendUnavailable,
    InvalidMetadata,
    InvalidOperation,
    OperationDropped,
    OperationPanic,
    TooLarge,
)
from consumer.executor import Ordering
from consumer.ids import ObjectId
from consumer.metrics import Counts
from consumer.operations import (
    Deleted,
    Got,
    Headed,
    Insert,
    Inserted,
    Metadata,
    PayloadReference,
    StoredObject,
)
from consumer.permits import ConcurrencyLimiter
from consumer.retry import RetryPolicy
from consumer.service import StorageService
from consumer.storage.backend import Payload
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage
from gates import CONTEXT, GatedStorage, Source, delete, get, head, insert, settled


def service(storage: Any = None, limit: int = 500, queue: int = 0, **more: Any) -> StorageService:
    """Make a service with a limiter of its own."""
    return StorageService(storage or GatedStorage(), ConcurrencyLimiter(limit, queue), **more)


class TestStream:
    """The reservation of a window."""

    async def test_reserves_a_tenth_of_what_is_available(self) -> None:
        """WIN-1, WIN-3, WIN-9: 500 permits give 50; holding 50 of 500 makes the next window 45."""
        storage_service = StorageService(GatedStorage())

        async with storage_service.stream() as first, storage_service.stream() as second:
            assert (first.window, second.window, storage_service.limiter.in_use) == (50, 45, 95)
        assert storage_service.limiter.in_use == 0

    @pytest.mark.parametrize(("limit", "window"), [(1, 1), (9, 1), (10, 1), (11, 2), (100, 10), (501, 51), (1000, 100)])
    async def test_windows_are_rounded_up(self, limit: int, window: int) -> None:
        """WIN-2, WIN-5."""
        async with service(limit=limit).stream() as executor:
            assert executor.window == window

    @pytest.mark.parametrize("fraction", [0.5, "0.5", Decimal("0.5"), Fraction(1, 2)])
    async def test_takes_another_fraction(self, fraction: Any) -> None:
        """WIN-7, contract 10: configurable here."""
        async with service(limit=100).stream(fraction=fraction) as executor:
            assert executor.window == 50

    async def test_takes_exactly_the_window_it_is_told(self) -> None:
        """Contract 4: other policies decide the window elsewhere; one bulk reservation all the same."""
        storage_service = service(limit=100)

        async with storage_service.stream(window=7) as executor:
            assert (executor.window, storage_service.limiter.in_use) == (7, 7)

    async def test_by_partition_it_reserves_one_permit(self) -> None:
        """Contract 10: whatever the share would be."""
        storage_service = service(limit=100)

        async with (
            storage_service.stream(ordering="partition") as shared,
            storage_service.stream(ordering="partition", window=9) as told,
        ):
            assert (shared.window, told.window, storage_service.limiter.in_use) == (1, 1, 2)

    @pytest.mark.parametrize("window", [None, 1, 7])
    async def test_with_nothing_available_fails_before_any_input_is_read(
        self, window: int | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        """WIN-4, WIN-8, RES-11: counted once, logged as a warning, nothing taken."""
        storage_service = service(limit=1)
        async with storage_service.limiter.acquire():
            with pytest.raises(AtCapacity), caplog.at_level(logging.DEBUG):
                storage_service.stream(window=window)

            assert storage_service.limiter.rejected == 1
            assert storage_service.limiter.in_use == 1
            assert [record.levelno for record in caplog.records] == [logging.WARNING]

    async def test_takes_all_or_nothing(self) -> None:
        """RES-1."""
        storage_service = service(limit=10)
        async with storage_service.stream(window=6):
            with pytest.raises(AtCapacity):
                storage_service.stream(window=5)

            assert storage_service.limiter.available == 4

    @pytest.mark.parametrize(
        "wrong", [{"ordering": "random"}, {"fraction": 0}, {"fraction": "1.1"}, {"window": 0}, {"window": -1}]
    )
    async def test_refuses_what_makes_no_sense_and_takes_nothing(self, wrong: dict[str, Any]) -> None:
        """Contract 10."""
        storage_service = service()

        with pytest.raises(ValueError, match=r"ordering|fraction|window"):
            storage_service.stream(**wrong)

        assert (storage_service.limiter.acquired_total, storage_service.limiter.rejected) == (0, 0)

    async def test_its_operations_take_no_further_permits(self) -> None:
        """RES-3, EXE-19: with the whole limit reserved, past any queue."""
        storage_service = service(limit=3)

        outcomes = storage_service.stream(fraction=1).execute(Source([head(str(number)) for number in range(30)]))
        indexes = [index async for index, _ in outcomes]

        assert len(indexes) == 30
        assert storage_service.limiter.acquired_total == 3
        assert storage_service.limiter.rejected == 0

    @pytest.mark.parametrize("ordering", ["unordered", "key", "partition"])
    async def test_runs_on_tiered_storage(self, ordering: Ordering) -> None:
        """Contract 10, as its reader would write it."""
        backend = MemoryBackend()
        storage_service = StorageService(TieredStorage(backend, backend, threshold=100))
        large = bytes(1000)

        things = [insert("small"), insert("large", large), KeyError("mine"), insert(None)]
        async with storage_service.stream(ordering=ordering) as executor:
            answers = {index: answer async for index, answer in executor.execute(Source(things))}
        assert len(answers) == 4
        assert isinstance(answers[3], Inserted)

        got = await storage_service.get(get("large"))
        assert got.object is not None
        assert got.object.payload == large
        assert got.object.metadata.size == 1000
        await storage_service.join()

    async def test_a_long_stream_needs_no_more_than_its_window(self) -> None:
        """EXE-7: it holds no more than a short one."""
        storage_service = service(limit=40)
        source = Source([head("a")] * 5000)
        count = 0
        async for _ in storage_service.stream(ordering="key").execute(source):
            count += 1
            assert source.pulled - count <= 4

        assert count == 5000


class TestSingle:
    """One operation, one permit."""

    async def test_returns_its_response(self) -> None:
        """SVC-1, OP-5 … OP-8."""
        storage_service = service()

        assert await storage_service.insert(insert("k", b"1")) == Inserted(ObjectId(CONTEXT, "k"), Metadata())
        assert await storage_service.get(get("k")) == Got("k", StoredObject(Metadata(), b"1"))
        assert await storage_service.head(head("k")) == Headed("k", Metadata())
        assert await storage_service.delete(delete("k")) == Deleted("k")
        assert await storage_service.get(get("k")) == Got("k", None)
        limiter = storage_service.limiter
        assert (limiter.acquired_total, limiter.in_use) == (5, 0)

    async def test_holds_one_permit_while_it_runs(self) -> None:
        """SVC-1."""
        storage = GatedStorage("a", "b")
        storage_service = service(storage, limit=2)
        tasks = [asyncio.create_task(storage_service.head(head(key))) for key in "ab"]
        await settled()
        assert storage_service.limiter.in_use == 2

        with pytest.raises(AtCapacity):
            await storage_service.head(head("c"))
        assert ("head", "c") not in storage.calls
        storage.let_all_go()
        await asyncio.gather(*tasks)
        assert storage_service.limiter.in_use == 0

    async def test_raises_what_went_wrong(self) -> None:
        """Contract 10: a domain error, or a panic, or dropped; the permit comes back each time."""
        storage = GatedStorage()
        storage.failures |= {"away": BackendUnavailable, "broken": ValueError, "cancelled": asyncio.CancelledError}
        storage_service = service(storage, limit=1)

        for key, error in {
            "away": BackendUnavailable,
            "broken": OperationPanic,
            "cancelled": OperationDropped,
            "": InvalidOperation,
        }.items():
            with pytest.raises(error):
                await storage_service.head(head(key))
            assert storage_service.limiter.in_use == 0

    async def test_metadata_is_checked_before_a_permit_is_taken(self) -> None:
        """SVC-3."""
        storage_service = service()

        with pytest.raises(InvalidMetadata):
            await storage_service.insert(Insert(CONTEXT, "k", Metadata(compression="gzip"), b""))

        assert storage_service.limiter.acquired_total == 0

    async def test_goes_on_if_its_caller_goes_away(self) -> None:
        """SVC-2: and keeps its permit until it has ended; ``join`` waits for it."""
        storage = GatedStorage("a")
        storage_service = service(storage)
        caller = asyncio.create_task(storage_service.insert(insert("a")))
        await settled()
        caller.cancel()
        await asyncio.wait([caller])
        assert (caller.cancelled(), storage_service.limiter.in_use) == (True, 1)

        joining = asyncio.create_task(storage_service.join())
        await settled()
        assert not joining.done()
        storage.let_go("a")
        await joining
        assert list(storage.objects) == ["testing/objects/a"]
        assert storage_service.limiter.in_use == 0

    async def test_a_failure_nobody_hears_of_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """ERR-4: and is no error of the event loop."""
        storage = GatedStorage("a")
        storage.failures["a"] = lambda: ValueError("unheard")
        storage_service = service(storage)
        caller = asyncio.create_task(storage_service.head(head("a")))
        await settled()
        caller.cancel()
        storage.let_go("a")
        await storage_service.join()
        await asyncio.wait([caller])

        assert "unheard" in caplog.text
        assert storage_service.limiter.in_use == 0

    @pytest.mark.parametrize("exit_error", [KeyboardInterrupt, SystemExit])
    async def test_an_exit_propagates_after_release(self, exit_error: type[BaseException]) -> None:
        """Contract 10."""
        storage = GatedStorage()
        storage.failures["a"] = exit_error
        storage_service = service(storage)

        with pytest.raises(exit_error):
            await storage_service.head(head("a"))

        assert storage_service.limiter.in_use == 0

    @pytest.mark.parametrize("exit_error", [KeyboardInterrupt, SystemExit])
    def test_an_exit_nobody_waits_for_ends_the_run(self, exit_error: type[BaseException]) -> None:
        """It must not vanish with its caller."""
        storage_service = service(storage := GatedStorage())
        storage.failures["a"] = exit_error

        async def leave() -> None:
            storage.hold("a")
            caller = asyncio.create_task(storage_service.head(head("a")))
            await settled()
            caller.cancel()
            await asyncio.wait([caller])
            storage.let_go("a")
            await settled()
            pytest.fail("the exit vanished")

        with pytest.raises(exit_error):
            asyncio.run(leave())
        assert storage_service.limiter.in_use == 0

    async def test_is_counted_once_when_it_runs_and_not_when_it_is_rejected(self) -> None:
        """SVC-5, MET-1, MET-2."""
        counts, storage = Counts(), GatedStorage()
        storage.failures["broken"] = ValueError
        storage_service = service(storage, limit=1, counts=counts)

        await storage_service.head(head("a"))
        with pytest.raises(OperationPanic):
            await storage_service.head(head("broken"))
        async with storage_service.limiter.acquire():
            with pytest.raises(AtCapacity):
                await storage_service.head(head("a"))

        heads = counts.operations["head"]
        assert (heads.started, heads.success.count, heads.error.count) == (2, 1, 1)

    async def test_streams_are_counted_in_the_same_place(self) -> None:
        """MET-1: one count for each kind, whichever way it ran."""
        counts = Counts()
        storage_service = service(counts=counts)

        async for _ in storage_service.stream().execute(Source([head("a"), get("a")])):
            pass
        await storage_service.head(head("a"))

        assert (counts.operations["head"].started, counts.operations["get"].started) == (2, 1)


class TestParts:
    """What the service hands on to the one handler of all its operations."""

    async def test_references_retries_and_limits_reach_every_operation(self) -> None:
        """Contract 6: in streams as in single operations."""

        class Opening:
            async def open(self, reference: PayloadReference) -> Payload:
                return reference.uri.encode()

        class AwayAtFirst(GatedStorage):
            away = 2

            async def put(self, object_id: ObjectId, metadata: Metadata, payload: Payload) -> Metadata:
                if self.away:
                    self.away -= 1
                    raise BackendUnavailable("away")
                return await super().put(object_id, metadata, payload)

        storage, said = AwayAtFirst(), list[bool]()
        storage_service = service(
            storage,
            references=Opening(),
            retry=RetryPolicy(1, 0, 0),
            on_blocked=said.append,
            object_bytes_max=9,
        )
        by_reference = Insert(CONTEXT, "k", Metadata(), PayloadReference("file:///a"))

        answers = [answer async for _, answer in storage_service.stream().execute(Source([by_reference]))]
        assert isinstance(answers[0], Inserted)
        await storage_service.insert(by_reference)
        with pytest.raises(TooLarge):
            await storage_service.insert(insert("k", bytes(10)))

        assert storage.objects["testing/objects/k"].payload == b"file:///a"
        assert said == [True, False]

    async def test_an_attempt_of_a_stream_has_its_time_limit(self) -> None:
        """Contract 2.2, ``timeout``: the answer comes when the work has ended, and the object's turn is passed on."""
        storage = GatedStorage("slow")
        storage_service = service(storage, retry=RetryPolicy(1, 0, 0, "answer", attempt_timeout_seconds=0.001))
        executor = storage_service.stream(ordering="key")

        answers = [answer async for answer in executor.execute(Source([head("slow"), head("slow"), get("fine")]))]

        assert [(index, getattr(answer, "code", None)) for index, answer in answers] == [
            (2, None),
            (0, "timeout"),
            (1, "timeout"),
        ]
        assert storage.running_max <= 2
        assert storage_service.limiter.in_use == 0


    async def test_what_does_not_end_at_its_time_limit_keeps_permit_and_turn_until_it_has_ended(self) -> None:
        """Contract 2.2: the effect may still happen, so nothing on that object runs, and no permit is free."""

        class Stubborn(GatedStorage):
            cancelled = asyncio.Event()

            async def put(self, object_id: ObjectId, metadata: Metadata, payload: Payload) -> Metadata:
                try:
                    return await super().put(object_id, metadata, payload)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    await super().put(object_id, metadata, payload)  # a thread that nobody can stop
                    raise

        storage = Stubborn("k")
        retry = RetryPolicy(1, 0, 0, "answer", attempt_timeout_seconds=0.001)
        storage_service = service(storage, 3, retry=retry)
        executor = storage_service.stream(ordering="key", window=3)
        outcomes = executor.execute(Source([insert("k"), get("k"), get("other")]))
        assert (await anext(outcomes))[0] == 2
        second = asyncio.create_task(outcomes.__anext__())

        await storage.cancelled.wait()
        await settled()
        held = storage_service.limiter.in_use, executor.in_flight, second.done(), ("get", "k") in storage.calls
        storage.let_go("k")
        first_outcome = await second
        last_outcome = await anext(outcomes)
        assert await anext(outcomes, None) is None

        assert held == (3, 1, False, False)
        assert (first_outcome[0], getattr(first_outcome[1], "code", None)) == (0, "timeout")
        assert last_outcome == (1, Got("k", StoredObject(Metadata(), b"payload"))), "the effect had happened after all"
        assert storage_service.limiter.in_use == 0


class TestJoin:
    """The end of everything that was begun."""

    async def test_waits_for_the_background_work_of_storage(self) -> None:
        """SVC-4: its ``join`` is called when no operation runs any more."""
        storage = GatedStorage()
        await service(storage).join()

        assert storage.joined == 1

    async def test_a_storage_needs_no_join(self) -> None:
        """Contract 10: it is optional; anything with four coroutine methods will do."""

        class Smallest:
            async def put(self, object_id: ObjectId, metadata: Metadata, payload: Payload) -> Metadata:
                return metadata

            async def get(self, object_id: ObjectId) -> StoredObject | None:
                return None

            async def head(self, object_id: ObjectId) -> Metadata | None:
                return None

            async def delete(self, object_id: ObjectId) -> None:
                pass

        storage_service = service(Smallest())
        await storage_service.insert(insert("k"))
        await storage_service.join()

        assert storage_service.limiter.released_total == 1

    async def test_waits_for_operations_of_a_forgotten_stream(self) -> None:
        """SVC-4: storage must not be closed under them."""
        storage = GatedStorage("a")
        storage_service = service(storage)
        async for _ in storage_service.stream().execute(Source([head("a"), head("b")])):
            break
        joining = asyncio.create_task(storage_service.join())
        await settled()

        assert (joining.done(), storage.joined) == (False, 0)
        storage.let_go("a")
        await joining
        assert (storage.joined, storage_service.limiter.in_use) == (1, 0)


def test_the_public_names_are_here() -> None:
    """Contract 10: importable from the package itself."""
    assert consumer.StorageService is StorageService
    assert consumer.ConcurrencyLimiter is ConcurrencyLimiter
