"""Schemas by id: a registry's answer is believed, whatever else comes back is waited out, and all of it is bounded."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import wire
from consumer import registry as module
from consumer.assignment import Assignment, Owner, Pipeline
from consumer.avro_schemas import OPERATION_FINGERPRINT, schema_text
from consumer.budget import ByteBudget
from consumer.codec import OperationDecoder
from consumer.errors import ConfigError, DecodeError
from consumer.metrics import Counts
from consumer.registry import ANSWER_BYTES_MAX, SchemaRegistry
from consumer.responses import Header
from consumer.retry import RetryPolicy
from consumer.service import StorageService
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage
from registry_stub import Canned, RegistryStub, by_id, guid_of, json_of

AT_ONCE = RetryPolicy(initial_seconds=0.001, max_seconds=0.001, attempt_timeout_seconds=10.0)
"""Tests need not wait between attempts."""

OPERATION, RESPONSE = schema_text("operation"), schema_text("response")

RECURSIVE = {"type": "record", "name": "R", "fields": [{"name": "f", "type": ["null", "R"]}]}
NESTED = {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": "long"}}}


@pytest.fixture
async def stub() -> AsyncIterator[RegistryStub]:
    """A registry that knows the operation's schema as 1."""
    stub = RegistryStub()
    stub.add(OPERATION)
    await stub.start()
    yield stub
    stub.gate.set()
    await stub.stop()


Make = Callable[..., SchemaRegistry]


@pytest.fixture
async def make(stub: RegistryStub) -> AsyncIterator[Make]:
    """A maker of clients of the stub; they are closed after the test."""
    made: list[SchemaRegistry] = []

    def new(**options: Any) -> SchemaRegistry:
        made.append(SchemaRegistry(options.pop("url", stub.url), **{"retry": AT_ONCE, **options}))
        return made[-1]

    yield new
    for registry in made:
        await registry.close()


class Clock:
    """Monotonic time that goes on when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Telling(SchemaRegistry):
    """Tells when it has noticed that the registry is unavailable."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.said = asyncio.Event()

    def _say(self, wrong: str) -> None:
        super()._say(wrong)
        self.said.set()


def refusal(registry: SchemaRegistry, schema_id: str) -> str:
    """Why the schema is refused."""
    with pytest.raises(DecodeError) as caught:
        registry.lookup(schema_id)
    assert caught.value.code == "unsafe_schema"
    return str(caught.value)


class TestKnown:
    """Schemas the registry has."""

    @pytest.mark.parametrize(("schema_id", "path"), [("1", "ids/1"), (str(guid_of(1)), f"guids/{guid_of(1)}")])
    async def test_a_schema_is_asked_for_once(self, stub: RegistryStub, make: Make, schema_id: str, path: str) -> None:
        """Contract 2.4: by id and by GUID."""
        registry = make()
        assert registry.lookup(schema_id) is None
        assert not registry.knows(schema_id)

        for _ in range(3):
            await registry.ensure(schema_id)
            assert registry.knows(schema_id)
            schema = registry.lookup(schema_id)

            assert schema is not None
            assert schema.fingerprint == OPERATION_FINGERPRINT
        assert stub.asked == [f"GET /schemas/{path}"]

    async def test_an_address_may_have_a_path(self, stub: RegistryStub, make: Make) -> None:
        stub.canned["/apis/ccompat/v7/schemas/ids/7"] = json_of(200, schema='"long"')
        registry = make(url=f"{stub.url}/apis/ccompat/v7/")

        await registry.ensure("7")

        assert registry.lookup("7")

    async def test_whoever_comes_meanwhile_waits_for_the_same_answer(self, stub: RegistryStub, make: Make) -> None:
        """Faults 4.4: single flight per id."""
        registry = make()
        stub.gate.clear()
        asking = [asyncio.create_task(registry.ensure("1")) for _ in range(50)]
        await stub.wait_asked(1)

        stub.gate.set()
        await asyncio.gather(*asking)

        assert registry.lookup("1")
        assert len(stub.asked) == 1

    async def test_different_ids_are_asked_for_side_by_side(self, stub: RegistryStub, make: Make) -> None:
        registry = make()
        stub.add('"long"')
        stub.gate.clear()
        asking = [asyncio.create_task(registry.ensure(schema_id)) for schema_id in ("1", "2")]

        await stub.wait_asked(2)

        stub.gate.set()
        await asyncio.gather(*asking)
        assert registry.lookup("2")

    async def test_when_the_one_asking_is_cancelled_another_asks(self, stub: RegistryStub, make: Make) -> None:
        """A partition is revoked while another waits for the same schema."""
        registry = make()
        stub.gate.clear()
        first, second = (asyncio.create_task(registry.ensure("1")) for _ in range(2))
        await stub.wait_asked(1)

        first.cancel()
        await asyncio.wait([first])
        await stub.wait_asked(2)
        stub.gate.set()
        await second

        assert first.cancelled()
        assert registry.lookup("1")
        assert not registry.waiting

    async def test_the_schemas_used_last_are_kept(
        self, stub: RegistryStub, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Faults 4.4: bounded."""
        monkeypatch.setattr(module, "SCHEMAS_MAX", 2)
        registry = make()
        for _ in range(2):
            stub.add('"long"')
        await registry.ensure("1")
        await registry.ensure("2")
        registry.lookup("1")

        await registry.ensure("3")

        assert [registry.knows(schema_id) for schema_id in "123"] == [True, False, True]
        await registry.ensure("2")
        assert registry.lookup("2")

    async def test_large_schemas_leave_less_room(
        self, stub: RegistryStub, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "SCHEMAS_BYTES_MAX", 2 * len(OPERATION) + 100)
        registry = make()
        stub.schemas *= 5
        for schema_id in ("1", "2", "3", "4", "5"):
            await registry.ensure(schema_id)

        assert [registry.knows(schema_id) for schema_id in "12345"] == [False, False, False, True, True]


class TestUnknown:
    """Schemas the registry does not have."""

    async def test_an_unknown_id_is_remembered_for_a_minute(self, stub: RegistryStub, make: Make) -> None:
        """Contract 2.4."""
        clock = Clock()
        registry = make(now=clock)

        for _ in range(3):
            await registry.ensure("2")
            assert registry.lookup("2") is None
        clock.now += 59.9
        await registry.ensure("2")
        assert len(stub.asked) == 1

        clock.now += 0.2
        stub.add('"long"')
        await registry.ensure("2")
        assert registry.lookup("2")
        assert len(stub.asked) == 2

    async def test_only_so_many_are_remembered(
        self, stub: RegistryStub, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Faults 4.4: a flood of random ids."""
        monkeypatch.setattr(module, "UNKNOWN_MAX", 3)
        registry = make()

        for schema_id in ("10", "11", "12", "13", "14"):
            await registry.ensure(schema_id)

        assert [registry.knows(f"1{digit}") for digit in range(5)] == [False, False, True, True, True]

    @pytest.mark.parametrize(
        "schema_id",
        [
            OPERATION_FINGERPRINT,
            "2147483648",
            "4294967295",
            "../../subjects",
            "1/../2",
            "1?x",
            "",
            "\N{FULLWIDTH DIGIT ONE}",
            str(guid_of(1)).upper(),
        ],
    )
    async def test_what_cannot_be_an_id_is_never_asked_for(
        self, stub: RegistryStub, make: Make, schema_id: str
    ) -> None:
        """Faults 4.4: ids are 0 to 2^31 - 1; a fingerprint is no id; nothing else gets into an address."""
        registry = make()

        await registry.ensure(schema_id)

        assert registry.knows(schema_id)
        assert registry.lookup(schema_id) is None
        assert stub.asked == []

    async def test_a_registry_too_old_for_guids_knows_none(self, stub: RegistryStub, make: Make) -> None:
        """Else a record with a GUID, which anybody can write, would hold up its partition for ever."""
        registry = make()
        path = f"/schemas/guids/{guid_of(1)}"
        stub.canned[path] = json_of(404, error_code=404, message="HTTP 404 Not Found")

        await registry.ensure(str(guid_of(1)))

        assert registry.lookup(str(guid_of(1))) is None
        assert stub.asked == [f"GET {path}", "GET /schemas/ids/2147483647"]

    async def test_a_flood_is_slowed_down(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """Faults 4.4: ids nobody knows cost at most so many requests a second."""
        clock, waits = Clock(), []

        async def sleep(seconds: float) -> None:
            waits.append(round(seconds, 3))

        monkeypatch.setattr(asyncio, "sleep", sleep)
        registry = make(now=clock)
        for _ in range(103):
            await registry._pace()
        assert waits == [0.01, 0.02, 0.03]

        clock.now += 10
        for _ in range(101):
            await registry._pace()
        assert waits[3:] == [0.01]


ILL: dict[str, Canned] = {
    "an inner error": json_of(500, error_code=50001, message="Error in the backend data store"),
    "no leader": Canned(503),
    "too many requests": Canned(429),
    "no credentials": json_of(401, error_code=401, message="Unauthorized"),
    "wrong credentials": json_of(403, error_code=40301, message="Forbidden"),
    "another server": Canned(404, b"<html>not found</html>"),
    "a server of its kind without the path": json_of(404, error_code=404, message="HTTP 404 Not Found"),
    "a login page": Canned(200, b"<html>who are you?</html>"),
    "something else": json_of(200, schemas=[]),
    "a list": Canned(200, b"[1]"),
    "no text": json_of(200, schema={"type": "long"}),
    "deep": Canned(200, b"[" * 100_000),
    "nothing": Canned(204),
    "compressed, though not asked for": Canned(
        200, gzip.compress(b'{"schema": "\\"long\\""}'), {"Content-Encoding": "gzip"}
    ),
    "a code that is no number": json_of(404, error_code="40403"),
}


class TestUnavailable:
    """Answers from which nothing can be concluded."""

    @pytest.mark.parametrize("ill", ILL)
    async def test_it_is_waited_for(self, stub: RegistryStub, make: Make, ill: str) -> None:
        """Contract 2.4: registry unreachable = the partition waits, never a failure."""
        registry = make()
        stub.canned["*"] = ILL[ill]
        asking = asyncio.create_task(registry.ensure("1"))
        await stub.wait_asked(3)

        assert not asking.done()
        assert registry.waiting
        assert not registry.knows("1")

        del stub.canned["*"]
        await asking
        assert registry.lookup("1")
        assert not registry.waiting

    async def test_without_a_registry_even_a_guid_waits(self, stub: RegistryStub, make: Make) -> None:
        """A plain 404 says that a registry is old only where there is a registry."""
        registry = make()
        stub.canned["*"] = Canned(404)
        asking = asyncio.create_task(registry.ensure(str(guid_of(1))))
        await stub.wait_asked(4)

        assert not asking.done()
        del stub.canned["*"]
        await asking
        assert registry.lookup(str(guid_of(1)))

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_is_not_followed(self, stub: RegistryStub, make: Make, status: int) -> None:
        """Faults 4.4: the address comes from the configuration alone; credentials go nowhere else."""
        registry = make(username="u", password="p")
        stub.canned["/schemas/ids/1"] = Canned(status, b"", {"Location": f"{stub.url}/elsewhere"})
        asking = asyncio.create_task(registry.ensure("1"))
        await stub.wait_asked(2)

        assert set(stub.asked) == {"GET /schemas/ids/1"}
        assert registry.waiting
        del stub.canned["/schemas/ids/1"]
        await asking
        assert registry.lookup("1")

    async def test_one_that_is_down_is_found_when_it_is_up(
        self, stub: RegistryStub, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", logger="consumer.registry")
        registry = Telling(stub.url, retry=AT_ONCE, bearer_token="hunter2")
        await stub.stop()
        asking = asyncio.create_task(registry.ensure("1"))
        await registry.said.wait()

        await stub.start()
        await asking

        assert registry.lookup("1")
        await registry.close()
        said = [record.getMessage() for record in caplog.records if record.name == "consumer.registry"]
        assert [line.partition(":")[0] for line in said] == [
            "schema registry unavailable",
            "schema registry answers again",
        ]
        assert "hunter2" not in repr([vars(record) for record in caplog.records]) + repr(registry)

    async def test_one_that_never_answers_is_given_up_in_time(self, stub: RegistryStub, make: Make) -> None:
        """Faults 4.4: every request has a deadline."""
        registry = make(retry=RetryPolicy(initial_seconds=0, max_seconds=0, attempt_timeout_seconds=0.05))
        stub.gate.clear()
        asking = asyncio.create_task(registry.ensure("1"))
        await stub.wait_asked(3)

        assert registry.waiting
        stub.gate.set()
        await asking
        assert registry.lookup("1")

    async def test_nobody_waits_any_more_once_the_last_was_cancelled(self, stub: RegistryStub, make: Make) -> None:
        registry = make()
        stub.canned["*"] = Canned(503)
        asking = [asyncio.create_task(registry.ensure(schema_id)) for schema_id in "112"]
        await stub.wait_asked(4)

        for task in asking:
            task.cancel()
        await asyncio.wait(asking)

        assert not registry.waiting


class TestHostile:
    """Schemas that are refused: whoever can register one must not take down or hold up a reader."""

    @pytest.mark.parametrize(
        ("schema", "more", "why"),
        [
            (RECURSIVE, {}, "contains itself"),
            (NESTED, {}, "nested deeper than 2"),
            ({"type": "array", "items": "null"}, {}, "no bytes"),
            ({"type": "record", "name": "R", "fields": [{"name": "f", "type": "Other"}]}, {}, "not an Avro schema"),
            ('syntax = "proto3";', {"schemaType": "PROTOBUF"}, "JSON"),
            ('"long"', {"references": [{"name": "Other", "subject": "http://elsewhere/", "version": 1}]}, "others"),
            ("[" * 5000 + "]" * 5000, {}, ""),
        ],
    )
    async def test_a_refused_schema_is_unsafe_and_asked_for_once(
        self, stub: RegistryStub, make: Make, schema: Any, more: dict[str, Any], why: str
    ) -> None:
        """Contract 2.2, `unsafe_schema`; contract 6, `limits.avro_depth`; faults 4.3 and 4.4."""
        registry = make(depth_max=2)
        schema_id = str(stub.add(schema, **more))

        for _ in range(3):
            await registry.ensure(schema_id)
            assert why in refusal(registry, schema_id)
        assert stub.asked == [f"GET /schemas/ids/{schema_id}"]
        assert not registry.waiting

    @pytest.mark.parametrize(
        "canned",
        [
            json_of(200, schema='"long"', padding="x" * ANSWER_BYTES_MAX),
            Canned(200, b" " * 65_536, endless=True),
        ],
    )
    async def test_a_huge_answer_is_not_read_to_its_end(self, stub: RegistryStub, make: Make, canned: Canned) -> None:
        """Faults 4.4: size limited, whether the answer says how long it is or never ends."""
        registry = make()
        stub.canned["/schemas/ids/1"] = canned

        await registry.ensure("1")

        assert "bytes" in refusal(registry, "1")
        assert registry.knows("1")

    async def test_the_largest_schema_allowed_is_read(self, stub: RegistryStub, make: Make) -> None:
        symbols = [f"{'s' * 1000}{number}" for number in range(1000)]
        registry = make()
        schema_id = str(stub.add({"type": "enum", "name": "E", "symbols": symbols}))

        await registry.ensure(schema_id)

        assert registry.lookup(schema_id)


class TestCredentials:
    """Who asks."""

    async def test_a_user_and_password_are_sent(self, stub: RegistryStub, make: Make) -> None:
        """Contract 6, `schema_registry`."""
        registry = make(username="user", password="pass:wörd")

        await registry.ensure("1")

        kind, _, pair = stub.headers[0]["Authorization"].partition(" ")
        assert (kind, base64.b64decode(pair).decode()) == ("Basic", "user:pass:wörd")

    async def test_a_token_is_sent(self, stub: RegistryStub, make: Make) -> None:
        registry = make(bearer_token="token")

        await registry.ensure("1")

        assert stub.headers[0]["Authorization"] == "Bearer token"

    async def test_nothing_is_sent_where_there_is_nothing(self, stub: RegistryStub, make: Make) -> None:
        await make().ensure("1")

        assert "Authorization" not in stub.headers[0]

    @pytest.mark.parametrize("url", ["http://user:pass@registry", "http://registry/?a=b", "http://registry/#x"])
    def test_an_address_is_an_address_and_nothing_else(self, url: str) -> None:
        with pytest.raises(ConfigError, match=r"schema_registry\.url") as caught:
            SchemaRegistry(url)

        assert "pass" not in str(caught.value)

    def test_a_file_of_authorities_that_is_none_is_said(self, tmp_path: Path) -> None:
        nothing = tmp_path / "ca.pem"
        nothing.write_text("nothing")

        for path in (nothing, tmp_path / "absent.pem"):
            with pytest.raises(ConfigError, match=r"schema_registry\.ssl_ca_file"):
                SchemaRegistry("https://registry", ssl_ca_file=path)


class TestRegistering:
    """The responses' own schema."""

    async def test_a_new_schema_is_registered(self, stub: RegistryStub, make: Make) -> None:
        """Contract 2.4, `output.framing: confluent`."""
        registry = make()

        schema_id = await registry.register("responses-value", RESPONSE)

        assert (schema_id, stub.subjects) == (2, {"responses-value": [2]})
        assert json.loads(stub.schemas[1]["schema"]) == json.loads(RESPONSE)

    async def test_one_that_is_there_needs_no_right_to_write(self, stub: RegistryStub, make: Make) -> None:
        registry = make()
        await registry.register("responses-value", RESPONSE)
        stub.canned["/subjects/responses-value/versions"] = json_of(403, error_code=40301, message="read-only")

        assert await registry.register("responses-value", RESPONSE) == 2

    @pytest.mark.parametrize(
        ("canned", "said"),
        [
            (json_of(409, error_code=409, message="incompatible with version 3"), "409, incompatible with version 3"),
            (json_of(403, error_code=40301, message="read-only"), "403, read-only"),
            (Canned(404), "404"),
            (Canned(302, b"", {"Location": "/elsewhere"}), "302"),
            (json_of(200, id="7"), "200"),
            (json_of(200, id=2**31), "200"),
        ],
    )
    async def test_a_refusal_is_a_wrong_configuration(
        self, stub: RegistryStub, make: Make, canned: Canned, said: str
    ) -> None:
        stub.canned["/subjects/responses-value/versions"] = canned

        with pytest.raises(ConfigError, match=r"output\.framing confluent") as caught:
            await make().register("responses-value", RESPONSE)

        assert said in str(caught.value)
        assert "responses-value" in str(caught.value)

    async def test_one_that_is_away_is_waited_for(self, stub: RegistryStub, make: Make) -> None:
        registry = make()
        stub.canned["*"] = Canned(503)
        registering = asyncio.create_task(registry.register("responses-value", RESPONSE))
        await stub.wait_asked(3)

        assert registry.waiting
        del stub.canned["*"]

        assert await registering == 2


@dataclass
class FetchedRecord:
    """A record as the poller hands it over."""

    offset: int
    value: bytes | None
    timestamp: int = 0
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()


class Written:
    """An output lane that acknowledges nothing; what is written can be waited for."""

    def __init__(self) -> None:
        self.values: list[bytes | None] = []
        self.owners: list[tuple[Owner, int]] = []
        self._came = asyncio.Event()

    def append(
        self, key: bytes | None, value: bytes | None, headers: Sequence[Header], owner: Owner, token: int
    ) -> None:
        self.values.append(value)
        self.owners.append((owner, token))
        self._came.set()

    async def wait(self, count: int) -> None:
        """Wait until so many are written."""
        while len(self.values) < count:
            self._came.clear()
            await self._came.wait()

    def acknowledge(self) -> None:
        """Acknowledge everything."""
        for owner, token in self.owners:
            owner.acknowledged([token])
        self.owners.clear()


class TestPartition:
    """A partition at a record whose schema has to be asked for."""

    BARE = wire.operation("head", "k")
    FRAMED = by_id(1, BARE)

    def assign(self, registry: SchemaRegistry, lane: Written, budget: ByteBudget) -> Assignment:
        """A partition of its own service, opened at 0."""
        service = StorageService(TieredStorage(MemoryBackend(), MemoryBackend()))

        def failed(error: BaseException) -> None:
            raise error

        pipeline = Pipeline(
            service=service,
            decoder=OperationDecoder(resolver=registry),
            budget=budget,
            counts=Counts(),
            response_lane=lambda _partition: lane,
            dead_letter_lane=None,
            cluster_id="c",
            group_id="g",
            ordering="key",
            fraction=Fraction(1, 10),
            copy_headers=frozenset(),
            response_prefix=b"",
            response_bytes_max=1_000_000,
            dead_letter_bytes_max=1_000_000,
            read_bytes=1_000_000,
            derive_keys=True,
            show_keys=False,
            registry=registry,
        )
        assignment = Assignment(
            pipeline,
            "operations",
            0,
            epoch=1,
            executor=service.stream(),
            refill=lambda _assignment: None,
            resolved=lambda _count: None,
            failed=failed,
            wanted=lambda _assignment: None,
            freed=lambda: None,
        )
        assignment.begin(0)
        return assignment

    async def test_it_waits_with_its_reason_and_goes_on(self, stub: RegistryStub, make: Make) -> None:
        """Contract 2.4 and 8: reason `registry`, never a failure; records before it are answered meanwhile."""
        registry, lane, budget = make(), Written(), ByteBudget(1_000_000)
        stub.canned["*"] = Canned(503)
        assignment = self.assign(registry, lane, budget)

        values = (self.BARE, self.FRAMED, self.BARE)
        assignment.receive([FetchedRecord(offset, value) for offset, value in enumerate(values)])
        await stub.wait_asked(2)
        await lane.wait(1)

        assert assignment.paused_for() == ["registry"]
        assert len(lane.values) == 1
        del stub.canned["*"]
        await lane.wait(3)
        assert assignment.paused_for() == []
        lane.acknowledge()
        assert assignment.watermark == 3
        assert await assignment.drain(10)
        assert budget.used == 0

    async def test_it_drains_without_waiting_for_the_registry(self, stub: RegistryStub, make: Make) -> None:
        """Contract 3: what is not answered is not committed, and all that it took is given back."""
        registry, lane, budget = make(), Written(), ByteBudget(1_000_000)
        stub.gate.clear()
        assignment = self.assign(registry, lane, budget)
        records = [FetchedRecord(offset, self.FRAMED) for offset in range(1000)]
        assignment.receive(records)
        await stub.wait_asked(1)

        assert assignment.paused_for() == []  # nothing is known to be wrong
        assert await assignment.drain(10)

        assert (assignment.watermark, lane.values, budget.used) == (0, [], 0)
        assert not registry.waiting

    async def test_it_can_be_abandoned_while_it_asks(self, stub: RegistryStub, make: Make) -> None:
        registry, lane, budget = make(), Written(), ByteBudget(1_000_000)
        stub.canned["*"] = Canned(503)
        assignment = self.assign(registry, lane, budget)
        assignment.receive([FetchedRecord(0, self.FRAMED), FetchedRecord(1, self.BARE)])
        await stub.wait_asked(2)

        assert await assignment.abandon() is None

        assert (assignment.watermark, lane.values, budget.used) == (0, [], 0)
        assert not registry.waiting

    async def test_a_waiting_partition_keeps_its_window(self, stub: RegistryStub, make: Make) -> None:
        """Contract 4: only an idle one is passed on; nothing would come of it here."""
        registry, lane = make(), Written()
        stub.gate.clear()
        assignment = self.assign(registry, lane, ByteBudget(1_000_000))
        assignment.receive([FetchedRecord(0, self.FRAMED)])
        await stub.wait_asked(1)
        assignment._idle_since -= 60

        assert not assignment.idle
        assert await assignment.drain(10)

    async def test_records_too_large_are_answered_without_asking(self, stub: RegistryStub, make: Make) -> None:
        """Contract 2.2: over `limits.record_bytes` nothing is read, so nothing is asked."""
        registry, lane = make(), Written()
        assignment = self.assign(registry, lane, ByteBudget(100_000_000))

        assignment.receive([FetchedRecord(0, self.FRAMED + bytes(8 * 1024 * 1024))])
        await lane.wait(1)

        assert stub.asked == []
        lane.acknowledge()
        assert await assignment.drain(10)
