"""`inspect`, `why` and `top`: what they show of a record, and of a service's state."""

from __future__ import annotations

import base64
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from admin_double import AdminDouble
from brokers import unused_port
from cli_runner import Tierstream
from consumer.cli import inspection
from consumer.cli.inspection import Sample, printable, record_fields, words
from consumer.config import Config
from consumer.kafka import tools
from consumer.kafka.tools import Record
from service_process import clean_environment
from wire import datum, fingerprint, operation

CONFIG = Config.model_validate({"output": {"topic": "responses"}})
LIMITER = {"limit": 500, "in_use": 480, "available": 20, "queued": 0}
TOTALS = {
    "records": 1000, "responses": 990, "failures": 3, "poison": 2, "dead_letters": 2, "commits": 9, "rebalances": 1
}  # fmt: skip


def entry(**changes: Any) -> dict[str, Any]:
    """Return a partition of `/debug/state`: idle, but for *changes*."""
    return {
        "topic": "operations",
        "partition": 3,
        "epoch": 1,
        "window": 50,
        "in_flight": 0,
        "buffered": 0,
        "position": 1842,
        "committed": 1842,
        "lowest_unfinished": 1842,
        "finished_above_gap": 0,
        "high_watermark": 1842,
        "lag": 0,
        "paused_for": [],
        "oldest": None,
        **changes,
    }


def oldest(**changes: Any) -> dict[str, Any]:
    """Return the oldest operation of a partition."""
    return {
        "offset": 1842,
        "kind": "insert",
        "key_digest": "0123456789abcdef",
        "attempts": 1,
        "age_seconds": 0.01,
        "last_error": None,
        **changes,
    }


def state(*partitions: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a `/debug/state`."""
    usual = {"state": "running", "limiter": LIMITER, "totals": TOTALS, "storage": {}}
    return {**usual, "partitions": list(partitions), **changes}


@pytest.fixture
def service() -> Iterator[AdminDouble]:
    """A running service, as far as its admin port goes."""
    running = AdminDouble()
    yield running
    running.stop()


@pytest.fixture
def tierstream(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Tierstream:
    """The command."""
    return Tierstream(monkeypatch, capfd, tmp_path)


def a_record(value: bytes | None, **changes: Any) -> Record:
    """Return a record as it was read."""
    fields = {
        "topic": "operations", "partition": 3, "offset": 17, "timestamp": 1_700_000_000_123, "key": b"k", "headers": ()
    }  # fmt: skip
    return cast("Record", SimpleNamespace(**(fields | {"value": value} | changes)))


class TestInspect:
    """Contract 7: the JSON's shape."""

    def test_an_operation_is_shown_by_its_fields(self) -> None:
        """Bytes as base64, headers as text, null keys as null."""
        value = operation("insert", "k", b"\x00x", request_id="r", content_type="text/plain")
        shown = record_fields(a_record(value, key=None, headers=(("a", b"\xff"), ("b", None))), CONFIG)

        body = shown["operation"]["body"]
        assert list(shown) == [
            "topic", "partition", "offset", "timestamp", "key_base64", "headers", "framing", "schema_id", "operation"
        ]  # fmt: skip
        assert (shown["timestamp"], shown["key_base64"]) == (1_700_000_000_123, None)
        assert shown["headers"] == [["a", "\N{REPLACEMENT CHARACTER}"], ["b", None]]
        assert (shown["framing"], shown["schema_id"]) == ("bare", None)
        assert shown["operation"]["request_id"] == "r"
        assert (body["type"], body["key"], body["metadata"]["content_type"]) == ("Insert", "k", "text/plain")
        assert base64.b64decode(body["payload_base64"]) == b"\x00x"

    @pytest.mark.parametrize(
        ("value", "framing", "schema_id", "code"),
        [
            (None, None, None, "null_value"),
            (b"", "bare", None, "decode_error"),
            (operation("get", "k") + b"x", "bare", None, "decode_error"),
            (operation("get", "k\x00"), "bare", None, "invalid_operation"),
            (b"\x00\x00\x00\x00\x07" + operation("get", "k"), "confluent", "7", "unknown_schema"),
            (b"\xc3\x01" + bytes(8) + b"x", "single-object", "0" * 16, "unknown_schema"),
        ],
    )
    def test_what_cannot_be_decoded_is_shown_with_its_reason(
        self, value: bytes | None, framing: str | None, schema_id: str | None, code: str
    ) -> None:
        """The code is the one it was, or will be, answered with."""
        shown = record_fields(a_record(value), CONFIG)

        assert "operation" not in shown
        assert (shown["framing"], shown["schema_id"], shown["error"]["code"]) == (framing, schema_id, code)
        assert shown["error"]["message"]

    def test_a_single_object_frame_is_named(self) -> None:
        """Contract 2.4."""
        shown = record_fields(a_record(b"\xc3\x01" + fingerprint("operation") + operation("get", "k")), CONFIG)

        assert (shown["framing"], shown["schema_id"]) == ("single-object", fingerprint("operation")[::-1].hex())
        assert shown["operation"]["body"] == {"type": "Get", "key": "k"}

    @pytest.mark.parametrize(
        ("frame", "framing"),
        [
            (b"", "bare"),
            (b"\x00\x00\x00\x00\x07", "confluent"),
            (b"\x01" + bytes(16), "confluent"),
            (b"\xc3\x01" + fingerprint("response"), "single-object"),
        ],
    )
    def test_a_response_is_shown_as_one(self, frame: bytes, framing: str) -> None:
        """On the output topic, or by its header on any other."""
        value = frame + datum(
            "response",
            {
                "index": 0,
                "source": {"topic": "t", "partition": 0, "offset": 0},
                "request_id": None,
                "context": None,
                "kind": "delete",
                "key": "k",
                "status": 204,
                "result": ("Deleted", {}),
                "completed_at": 0,
            },
        )

        for record in (
            a_record(value, topic="responses"),
            a_record(value, headers=(("tierstream-response-id", b"t/0/0"),)),
        ):
            shown = record_fields(record, CONFIG)
            assert shown["framing"] == framing
            assert shown["response"]["result"] == {"type": "Deleted"}

    @pytest.mark.parametrize("value", [None, b"\xff"])
    def test_what_is_no_response_is_said_to_be_none(self, value: bytes | None) -> None:
        """Somebody else's record on the output topic."""
        shown = record_fields(a_record(value, topic="responses"), CONFIG)

        assert shown["error"]["code"] in {"null_value", "decode_error"}

    def test_text_has_the_operation_with_its_payload_as_text(
        self, tierstream: Tierstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For people: and nothing that a terminal would act on."""
        value = operation("insert", "\N{RIGHT-TO-LEFT OVERRIDE}k", b"hello\x1b[2J")
        self.hand_out(monkeypatch, a_record(value, key=b"\x1b]0;x\x07"))

        said = tierstream("inspect", "operations", "3", "17")

        assert said.code == 0
        assert "record     operations/3/17\ntimestamp  2023-11-14T22:13:20.123+00:00\n" in said.out
        assert '"payload": "hello\\\\x1b[2J"' in said.out
        assert all(one.isprintable() or one == "\n" for one in said.out)

    def test_text_has_a_hexdump_of_what_cannot_be_decoded(
        self, tierstream: Tierstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 7: hexdump and reason."""
        self.hand_out(monkeypatch, a_record(b"\xffnot an operation\x00" + b"z" * 2000))

        said = tierstream("inspect", "operations", "3", "17")

        assert said.code == 0
        assert "error      decode_error: " in said.out
        assert "00000000  ff 6e 6f 74 20 61 6e 20  6f 70 65 72 61 74 69 6f  |.not an operatio|\n" in said.out
        assert "… and 994 more bytes\n" in said.out

    @staticmethod
    def hand_out(monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
        """Let every place hold *record*."""

        async def record_at(*_: object) -> Record:
            return record

        monkeypatch.setattr(tools, "record_at", record_at)


class TestWords:
    """`why` in words."""

    @pytest.mark.parametrize(
        ("partition", "expected"),
        [
            pytest.param(entry(), "is idle: every record is answered", id="idle"),
            pytest.param(entry(lag=7), "has 7 records to read, and none has come from the broker yet", id="starved"),
            pytest.param(
                entry(lag=70, in_flight=50, oldest=oldest()), "moves: 50 of 50 in flight, 70 to go", id="moving"
            ),
            pytest.param(entry(position=None, lag=None), "has not begun", id="new"),
            pytest.param(
                entry(in_flight=1, oldest=oldest(age_seconds=14.23, attempts=3, last_error="backend_unavailable")),
                "waits for offset 1842 (insert 0123456789abcdef, 14.2 s, attempt 3 of 3, backend_unavailable)",
                id="stuck",
            ),
            pytest.param(
                entry(in_flight=1, oldest=oldest(age_seconds=2, kind=None, key_digest=None)),
                "waits for offset 1842 (unknown, 2.0 s)",
                id="slow",
            ),
            pytest.param(
                entry(paused_for=["at_capacity"], window=None, lag=5),
                "is paused; it has no permits: 480 of 500 are taken, and it asks again",
                id="starved of permits",
            ),
            pytest.param(
                entry(paused_for=["storage_unavailable", "bytes"], oldest=oldest(attempts=9)),
                "waits for offset 1842 (insert 0123456789abcdef, 0.0 s, attempt 9); storage is unavailable",
                id="two reasons",
            ),
            pytest.param(
                entry(
                    oldest=oldest(
                        age_seconds=14.23,
                        attempts=3,
                        last_error="backend_unavailable",
                        last_error_message="Bigtable: UNAVAILABLE",
                    )
                ),
                "waits for offset 1842 (insert 0123456789abcdef, 14.2 s, attempt 3 of 3, "
                "backend_unavailable: Bigtable: UNAVAILABLE)",
                id="in storage's own words",
            ),
            pytest.param(entry(paused_for=["out_of_range"]), "committed offset 1842 is no longer", id="out of range"),
            pytest.param(entry(paused_for=["something_new"]), "is paused; something new", id="a reason yet unknown"),
        ],
    )
    def test_each_state_has_its_words(self, partition: dict[str, Any], expected: str) -> None:
        """Contract 8: every reason; issue: offset, kind, key, age, attempts, error."""
        said = words(partition, state(partition), attempts=3)

        assert said.startswith("partition operations/3 ")
        assert expected in said

    def test_every_pause_reason_of_the_contract_has_words(self) -> None:
        """Contract 8."""
        reasons = [
            "at_capacity", "bytes", "offset_distance", "poison_limit", "storage_unavailable", "registry", "output",
            "out_of_range", "recovering",
        ]  # fmt: skip

        for reason in reasons:
            said = words(entry(paused_for=[reason]), state())
            assert len(said) > len(f"partition operations/3 is paused; {reason}") + 10
            assert "{" not in said

    def test_a_key_cannot_act_on_the_terminal(self) -> None:
        """With `admin.show_keys` it is whatever a producer wrote."""
        said = words(entry(oldest=oldest(age_seconds=5, key_digest="\x1b[2J\nx")), state())

        assert said.isprintable()
        assert printable("a\tb") == "a\\tb"


class TestWhy:
    """`why`."""

    def test_json_is_the_partitions_with_words(self, tierstream: Tierstream, service: AdminDouble) -> None:
        """Contract 7."""
        service.state = state(entry(), entry(partition=4, paused_for=["output"]))

        said = tierstream("why", "--url", service.url, "--json")

        assert said.code == 0
        assert [set(row) - set(entry()) for row in said.json] == [{"words"}, {"words"}]
        assert said.json[1] == {**entry(partition=4, paused_for=["output"]), "words": said.json[1]["words"]}

    def test_one_partition_can_be_asked_for(self, tierstream: Tierstream, service: AdminDouble) -> None:
        """A line each."""
        service.state = state(entry(), entry(partition=4), entry(topic="others"))

        assert tierstream("why", "operations", "4", "--url", service.url).out.count("\n") == 1
        assert tierstream("why", "operations", "--url", service.url).out.count("\n") == 2
        assert tierstream("why", "--url", service.url).out.count("\n") == 3

    def test_one_that_is_elsewhere_is_exit_1_with_what_is_here(
        self, tierstream: Tierstream, service: AdminDouble
    ) -> None:
        """Another process has it."""
        service.state = state(entry())

        said = tierstream("why", "operations", "5", "--url", service.url)

        assert (said.code, said.out) == (1, "")
        assert said.err.startswith("error: this process does not have operations/5\nhint: it has: operations/3;")

    def test_a_service_that_does_not_run_says_so_first(self, tierstream: Tierstream, service: AdminDouble) -> None:
        """A drain explains much."""
        service.state = state(state="draining")

        said = tierstream("why", "--url", service.url)

        assert said.out == "the service is draining\nno partition is assigned to this process\n"

    def test_the_address_is_in_the_configuration(self, tierstream: Tierstream, service: AdminDouble) -> None:
        """And with it how many attempts there are."""
        stuck = entry(oldest=oldest(age_seconds=3, attempts=2, last_error="timeout"))
        service.state = state(stuck)
        port = int(service.url.rpartition(":")[2])

        said = tierstream("why", config={"admin": {"port": port}, "retry": {"attempts": 5}})

        assert "attempt 2 of 5, timeout" in said.out

    @pytest.mark.parametrize("command", ["why", "top"])
    def test_nobody_there_is_exit_1_with_a_hint(
        self, tierstream: Tierstream, service: AdminDouble, command: str
    ) -> None:
        """Neither a closed port nor something else is a trace."""
        closed = tierstream(command, "--url", f"http://127.0.0.1:{unused_port()}")
        broken = tierstream(command, "--url", service.url)

        for said in (closed, broken):
            assert (said.code, said.out) == (1, "")
            assert "hint: --url names the admin port of a running service" in said.err


class TestTop:
    """`top`."""

    def test_json_is_the_state(self, tierstream: Tierstream, service: AdminDouble) -> None:
        """`--json` on every read command."""
        service.state = state(entry())

        assert tierstream("top", "--url", service.url, "--json").json == service.state

    def test_a_pipe_gets_one_picture_within_80_columns(self, tierstream: Tierstream, service: AdminDouble) -> None:
        """No escapes, all partitions, the troubled ones first."""
        service.state = state(
            entry(partition=0),
            entry(partition=1, lag=12345678, in_flight=50, topic="a-topic-with-quite-a-long-name-for-a-table"),
            entry(partition=2, paused_for=["storage_unavailable"], oldest=oldest(age_seconds=123.4)),
        )

        said = tierstream("top", "--url", service.url)
        lines = said.out.splitlines()

        assert (said.code, said.err) == (0, "")
        assert lines[0].startswith("tierstream running   permits 480/500   partitions 3")
        assert all(len(line) <= 80 for line in lines)
        assert "\x1b" not in said.out
        order = [next(number for number, line in enumerate(lines) if mark in line) for mark in ("123.4s", "12345678")]
        assert order == sorted(order)

    def test_rates_are_what_happened_between_two_looks(self) -> None:
        """Finished offsets, those above a gap included."""
        before = state(entry(lowest_unfinished=100), entry(partition=4, lowest_unfinished=100))
        after = state(
            entry(lowest_unfinished=120, finished_above_gap=30),
            entry(partition=4, lowest_unfinished=None),
            entry(partition=5),
        )
        after["totals"] = {**TOTALS, "records": 1500}
        sample = Sample(after, before, 2.0)

        assert [sample.rate(partition) for partition in sample.partitions] == [25.0, None, None]
        assert sample.total_rate("records") == 250.0
        assert Sample(after, None, 0.0).total_rate("records") is None

    def test_more_partitions_than_lines_are_counted(self) -> None:
        """What has trouble is never below the fold."""
        from rich.console import Console

        partitions = [entry(partition=number, lag=number) for number in range(100)]
        console = Console(width=80, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123

        with console.file:
            console.print(inspection.screen(Sample(state(*partitions), None, 0.0), rows=5, width=80))
            text = console.export_text()

        assert "operations/99 " in text
        assert "operations/94 " not in text
        assert "… and 95 more partitions" in text

    @pytest.mark.slow
    @pytest.mark.process
    def test_on_a_terminal_it_goes_on_until_ctrl_c(self, service: AdminDouble, tmp_path: Path) -> None:
        """New states appear, an outage is shown and waited out; Ctrl-C ends it cleanly with the screen restored."""
        service.state = state(entry(), state="running")
        terminal, child = pty.openpty()
        command = [sys.executable, "-m", "consumer", "top", "--url", service.url, "--interval", "0.2"]
        environment = clean_environment(TERM="xterm", COLUMNS="80", LINES="24")
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdin=child, stdout=child, stderr=child, start_new_session=True
        ) as process:
            os.close(child)
            shown = b""

            def until(text: bytes) -> None:
                nonlocal shown
                deadline = time.monotonic() + 20
                while text not in shown:
                    assert time.monotonic() < deadline, shown
                    if select.select([terminal], [], [], 0.5)[0]:
                        shown += os.read(terminal, 65536)

            until(b"tierstream running")
            service.state = state(entry(), state="draining")
            until(b"tierstream draining")
            service.state = None
            until(b"disconnected")
            service.state = state(entry(), state="rebalancing")
            until(b"tierstream rebalancing")
            process.send_signal(2)
            until(b"\x1b[?1049l")
            assert process.wait(timeout=20) == 0
            os.close(terminal)

        assert b"Traceback" not in shown
