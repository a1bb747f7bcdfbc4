"""`demo` and `bench` as a newcomer meets them: they end by themselves, and what they report can be believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from consumer.demo import CONTEXT, Expected, Ledger
from service_process import command_line


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a few real files, one of them above 512 KiB."""
    folder = tmp_path / "source"
    (folder / "below").mkdir(parents=True)
    for number in range(20):
        (folder / "below" / f"{number}.txt").write_text(f"file {number}\n" * (number + 1))
    (folder / "above.bin").write_bytes(bytes(range(256)) * 2500)
    return folder


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_demo_checks_every_response_and_says_so(source: Path, tmp_path: Path) -> None:
    """Contract 7: a report that has checked itself; exit 0 only if nothing is missing or wrong; nothing left behind."""
    before = set(Path("/tmp").glob("tierstream-demo-*"))
    done = command_line("demo", "--no-wait", "--json", "--source", str(source), cwd=tmp_path, seconds=110)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["records"] == report["responses"] > 4_000
    assert (report["missing"], report["duplicated"], report["mismatched"]) == (0, 0, [])
    assert report["by_kind"].keys() == {"insert", "get", "head", "delete", "unknown"}
    assert report["failures"] == {"decode_error": 4, "null_value": 1, "unknown_schema": 1}
    assert report["bytes_stored"]["high_volume"] > 0
    assert report["bytes_stored"]["long_term"] > 6 * 1024 * 1024
    assert len(report["windows"]) == 6
    assert set(Path("/tmp").glob("tierstream-demo-*")) <= before


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_benchmark_reports_both_sides_and_the_stages(tmp_path: Path) -> None:
    """One run, one broker, medians and their ratio; how large it is decides no test."""
    done = command_line("bench", "--records", "5000", "--rounds", "1", "--json", cwd=tmp_path, seconds=110)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["records"] == 5000
    assert len(report["bare"]) == len(report["service"]) == 1
    assert report["ratio"] > 0
    assert all(cost > 0 for cost in report["stages_microseconds"].values())


def answer(partition: int = 0, offset: int = 0, **fields: Any) -> dict[str, Any]:
    """A response as decoded, right unless *fields* say otherwise."""
    response: dict[str, Any] = {
        "index": offset,
        "source": {"topic": "operations", "partition": partition, "offset": offset},
        "status": 201,
        "key": "k",
        "result": {"type": "Inserted", "metadata": {"size": 1}},
    }
    return {**response, **fields}


class TestTheLedgerOfTheDemo:
    """A report that cannot be wrong proves nothing: each mistake of a service is seen."""

    @pytest.fixture
    def ledger(self) -> Ledger:
        """A ledger with one insert."""
        ledger = Ledger()
        ledger.sent(0, 0, Expected("insert", 201, "k"))
        return ledger

    def test_a_right_response_is_right(self, ledger: Ledger) -> None:
        ledger.check(answer())

        assert (ledger.missing, ledger.duplicated, ledger.unexpected, ledger.wrong) == (0, 0, 0, [])

    def test_a_record_without_response_is_missing(self, ledger: Ledger) -> None:
        assert ledger.missing == 1

    def test_a_second_response_is_a_duplicate(self, ledger: Ledger) -> None:
        ledger.check(answer())
        ledger.check(answer())

        assert (ledger.missing, ledger.duplicated) == (0, 1)

    def test_a_response_to_nothing_is_unexpected(self, ledger: Ledger) -> None:
        ledger.check(answer(partition=1))

        assert (ledger.missing, ledger.unexpected) == (1, 1)

    @pytest.mark.parametrize(
        "mistake",
        [
            {"status": 200},
            {"index": 1},
            {"key": "other"},
            {"result": {"type": "Failure", "code": "panic", "message": "x", "retriable": False}},
        ],
    )
    def test_a_response_that_says_something_else_is_wrong(self, ledger: Ledger, mistake: dict[str, Any]) -> None:
        ledger.check(answer(**mistake))

        assert len(ledger.wrong) == 1

    def test_other_bytes_than_were_stored_are_wrong(self) -> None:
        ledger = Ledger()
        ledger.sent(0, 0, Expected("get", 200, "k", size=1, crc32c=0))
        ledger.check(
            answer(status=200, result={"type": "Got", "object": {"metadata": {"size": 1}, "payload": b"other"}})
        )

        assert len(ledger.wrong) == 1

    def test_an_answer_where_a_failure_is_expected_is_wrong(self) -> None:
        ledger = Ledger()
        ledger.sent(0, 0, Expected("unknown", 400, code="decode_error"))
        ledger.check(answer(status=400, key=None))

        assert len(ledger.wrong) == 1


def test_objects_of_the_demo_have_a_scope() -> None:
    """The demo shows scopes, as most users have them."""
    assert CONTEXT.storage_prefix == "demo/source.files/objects/"
