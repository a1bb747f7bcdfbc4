"""The judges of the chaos tests see what they are there to see, and nothing where all is well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

import chaos_plan
import wire
from brokers import Broker
from chaos_plan import Action, Plan
from fleet import DRAIN_SECONDS, MEMORY_SAMPLES_MIN, Fleet, Member, growth_of, has_tendency
from group_history import Commit, GroupHistory, parse
from invariants import (
    Arrival,
    Fault,
    Interval,
    Repeat,
    Reply,
    Unexplained,
    beyond_windows,
    busy_moments,
    commits_gone_back,
    commits_past_unanswered,
    longest_silence,
    permits_astray,
    permits_out_of_bounds,
    repeats_below_commit,
    repeats_of,
    unexplained,
)
from ledger import Answer, Content, Entry, Headers, Ledger, Reader
from load import Load, payload_of, read_back
from proxy import REQUESTS

SESSION_SECONDS = 6.0
"""Of the members of a fleet."""

ARRIVALS = [Arrival(0, offset, 100) for offset in range(4)]
REPLIES = [Reply(0, 0, 110), Reply(0, 2, 120), Reply(0, 1, 130), Reply(0, 3, 140)]


class TestCommits:
    """I4 and I5, of every commit."""

    def test_a_commit_behind_all_answers_is_right(self) -> None:
        commits = [Commit(0, 1, 110), Commit(0, 3, 130), Commit(0, 4, 999)]

        assert commits_past_unanswered(ARRIVALS, REPLIES, commits) == []
        assert commits_gone_back(commits) == []

    def test_a_commit_before_an_answer_is_found(self) -> None:
        """Offset 2 is answered, and 1 below it not yet."""
        (wrong,) = commits_past_unanswered(ARRIVALS, REPLIES, [Commit(0, 3, 129), Commit(0, 4, 140)])

        assert wrong == "partition 0: 3 committed, 1 answered 1 ms later"

    def test_a_commit_of_what_is_never_answered_is_found(self) -> None:
        (wrong,) = commits_past_unanswered(ARRIVALS, REPLIES[:-1], [Commit(0, 4, 999)])

        assert "3 answered never" in wrong

    def test_a_commit_of_what_is_answered_and_not_dead_lettered_is_found(self) -> None:
        """Which is why dead letters are replies of their own, to the records that need one."""
        poison, letters = [ARRIVALS[1], ARRIVALS[3]], [Reply(0, 1, 125)]

        assert commits_past_unanswered(ARRIVALS, REPLIES, [Commit(0, 4, 999)]) == []
        assert commits_past_unanswered(poison, letters, [Commit(0, 3, 130)], "dead-lettered") == []
        (late,) = commits_past_unanswered(poison, letters, [Commit(0, 3, 124)], "dead-lettered")
        assert late == "partition 0: 3 committed, 1 dead-lettered 1 ms later"
        (never,) = commits_past_unanswered(poison, letters, [Commit(0, 4, 999)], "dead-lettered")
        assert never == "partition 0: 4 committed, 3 dead-lettered never"

    def test_another_partition_answers_for_nobody_else(self) -> None:
        assert commits_past_unanswered([Arrival(1, 0, 0)], REPLIES, [Commit(1, 1, 999)]) != []

    def test_a_commit_that_goes_back_is_found_though_the_next_one_mends_it(self) -> None:
        """Which is what a look every 100 ms may miss."""
        commits = [Commit(0, 3, 1), Commit(1, 1, 1), Commit(0, 2, 2), Commit(0, 4, 3)]

        assert commits_gone_back(commits) == ["partition 0: committed 2 after 3"]


class TestRepeats:
    """I5 and I6."""

    WINDOW = 2

    def judge(
        self, replies: list[Reply], commits: list[Commit], faults: list[Fault], no_commits: list[Interval] | None = None
    ) -> Unexplained:
        return unexplained(repeats_of(replies), commits, faults, window=self.WINDOW, no_commits=no_commits or ())

    def wrong(
        self, replies: list[Reply], commits: list[Commit], faults: list[Fault], no_commits: list[Interval] | None = None
    ) -> list[Repeat]:
        return self.judge(replies, commits, faults, no_commits).wrong

    def test_a_repeat_of_what_was_not_committed_is_explained_by_a_fault_between_the_answers(self) -> None:
        replies = [*REPLIES, Reply(0, 3, 300_000)]
        fault = Fault(200_000, fresh=200_000)

        assert self.judge(replies, [Commit(0, 3, 130)], [fault]) == Unexplained(0, [])
        assert self.wrong(replies, [Commit(0, 4, 150)], [fault]) != [], "it was committed when the fault came"
        assert self.wrong(replies, [], [Fault(302_000, fresh=999_999)]) != [], "the fault came after the second answer"
        assert self.wrong(replies, [], []) == [Repeat(0, 3, 140, 300_000)]

    def test_what_was_answered_long_before_the_fault_and_never_committed_is_wrong_however_many_there_are(self) -> None:
        """Nobody commits anything, and a member is killed after a hundred seconds."""
        answers = [Reply(0, offset, offset) for offset in range(100_000)]
        again = [Reply(0, offset, 200_000 + offset) for offset in range(100_000)]

        wrong = self.wrong(answers + again, [], [Fault(100_000, fresh=10_200)])

        assert len(wrong) == 100_000 - 10_200, "one interval and a commit's time before the fault are explained"
        assert {repeat.before < 89_800 for repeat in wrong} == {True}

    def test_when_nobody_could_commit_does_not_count(self) -> None:
        replies, fault = [*REPLIES, Reply(0, 3, 90_000)], Fault(60_140, fresh=10_000)

        assert self.wrong(replies, [], [fault]) == [Repeat(0, 3, 140, 90_000)]
        assert self.wrong(replies, [], [fault], [(140, 50_140)]) == []
        assert self.wrong(replies, [], [fault], [(140, 30_000), (20_000, 50_140)]) == []
        assert self.wrong(replies, [], [fault], [(140, 50_139)]) != [], "a millisecond too long"

    def test_each_fault_explains_one_repeat_of_a_record(self) -> None:
        replies = [*REPLIES, Reply(0, 3, 90_000), Reply(0, 3, 180_000)]
        first, second = Fault(200, fresh=1_000), Fault(90_500, fresh=1_000)

        assert self.wrong(replies, [], [first]) == [Repeat(0, 3, 90_000, 180_000)]
        assert self.wrong(replies, [], [first, second]) == []
        assert self.wrong(replies, [], [second]) == [Repeat(0, 3, 140, 90_000)], "answered for long"

    def test_what_is_answered_after_a_kill_was_in_flight_and_that_is_one_window_of_each_partition(self) -> None:
        """The requests of who was killed were on their way."""
        replies = [Reply(partition, offset, 1_500) for partition in range(2) for offset in range(3)]
        replies += [Reply(one.partition, one.offset, 9_000) for one in replies]
        kill = Fault(400, fresh=1_000)

        assert len(self.wrong(replies, [], [kill])) == 2, "a third one of each partition"
        assert self.judge(replies, [], [kill, kill]).in_flight == 6, "two faults, two windows"
        assert len(self.wrong([Reply(0, 0, 31_000), Reply(0, 0, 31_001)], [], [kill])) == 1, "gone for long"

    def test_windows_of_another_partition_or_of_a_fault_at_another_time_help_nobody(self) -> None:
        replies = [Reply(0, offset, at) for offset in range(3) for at in (1_500, 9_000)]

        assert len(self.wrong(replies, [], [Fault(400, fresh=100), *[Fault(90_000, fresh=100)] * 50])) == 1

    def test_who_is_still_alive_may_answer_a_window_more_of_what_others_have_answered(self) -> None:
        """A member is frozen at 200 with offset 3 in flight; another one answers and commits; it thaws at 14,000."""
        replies, commits = [*REPLIES, Reply(0, 3, 14_100)], [Commit(0, 4, 500)]

        assert self.judge(replies, commits, [Fault(14_000, fresh=100, windows=2)]) == Unexplained(1, [])
        assert self.wrong(replies, commits, [Fault(14_000, fresh=100)]) != [], "a kill leaves nobody who could"

    def test_windows_are_given_to_those_who_have_no_other(self) -> None:
        late = [Repeat(0, offset, before, before + 5) for offset, before in enumerate([900, 900, 30_800, 30_800])]
        faults = [Fault(40, fresh=0), Fault(30_790, fresh=0)]

        assert beyond_windows(late[::-1], faults, self.WINDOW) == []
        assert len(beyond_windows(late, faults[:1], self.WINDOW)) == 2

    def test_an_answer_below_a_commit_is_found(self) -> None:
        late = Reply(0, 1, 200)

        assert repeats_below_commit([*REPLIES, late], [Commit(0, 2, 150)]) == [Repeat(0, 1, 130, 200)]
        assert repeats_below_commit([*REPLIES, late], [Commit(0, 1, 150)]) == []
        assert repeats_below_commit([*REPLIES, late], [Commit(0, 2, 200)]) == [], "at the same moment: nobody knows"


class TestSilence:
    """I10: only while something waits, and only where somebody could have answered."""

    def test_it_is_the_longest_wait_for_the_next_answer(self) -> None:
        arrivals = [Arrival(0, 0, 1_000), Arrival(0, 1, 1_000), Arrival(0, 2, 60_000)]
        replies = [Reply(0, 0, 2_000), Reply(0, 1, 7_000), Reply(0, 2, 61_000)]

        assert longest_silence(arrivals, replies, until=61_000) == 5.0

    def test_what_is_never_answered_waits_until_the_end(self) -> None:
        assert longest_silence([Arrival(0, 0, 1_000)], [], until=31_000) == 30.0

    def test_an_outage_does_not_count_and_is_not_counted_twice(self) -> None:
        outages = [(1_000, 6_000), (5_000, 8_000)]

        assert longest_silence([Arrival(0, 0, 0)], [Reply(0, 0, 10_000)], until=10_000, excused=outages) == 3.0

    def test_a_repeat_is_no_progress(self) -> None:
        arrivals = [Arrival(0, 0, 0), Arrival(0, 1, 0)]
        replies = [Reply(0, 0, 0), Reply(0, 0, 20_000), Reply(0, 1, 40_000)]

        assert longest_silence(arrivals, replies, until=40_000) == 40.0

    def test_moments_with_work_in_flight_are_counted(self) -> None:
        assert busy_moments(ARRIVALS, REPLIES, [99, 100, 139, 140, 500]) == 2


class TestHistory:
    """What Apache Kafka 4.3 has written into its offsets topic, byte for byte."""

    KEY = b"\x00\x01\x00\x05group\x00\x05topic\x00\x00\x00\x03"
    PLAIN = (
        b"\x00\x04\x00\x00\x00\x00\x00\x00\x00P\xff\xff\xff\xff\x01\x00\x00\x01\xa2\x1fk\xb6\xa0\x01\x00\x10\xcc\x9cy"
        b"\xc6\xee\\G\xa3\xa2\xfef\xc0\x87\x93f\x1e"
    )

    @staticmethod
    def record(key: bytes, value: bytes | None) -> Answer:
        return Answer(partition=0, offset=0, key=key, value=value, headers=[], timestamp=5)

    def test_commits_generations_and_what_concerns_others_are_told_apart(self) -> None:
        mapped = self.PLAIN[:14] + b"\x04ts1" + self.PLAIN[15:]
        of_version_3 = b"\x00\x03" + self.PLAIN[2:14] + b"\x00\x03ts1" + self.PLAIN[15:23]
        history = parse(
            [
                self.record(b"\x00\x02\x00\x05group", b"members"),
                self.record(self.KEY, self.PLAIN),
                self.record(self.KEY, mapped),
                self.record(self.KEY, of_version_3),
                self.record(self.KEY, None),
                self.record(self.KEY.replace(b"group", b"other"), self.PLAIN),
                self.record(self.KEY.replace(b"topic", b"other"), self.PLAIN),
                self.record(b"\x00\x03\x00\x05group", b"of another protocol"),
            ],
            "group",
            "topic",
        )

        at = 0x01A21F6BB6A0
        assert history == GroupHistory([Commit(3, 80, at), Commit(3, 80, at, "ts1"), Commit(3, 80, at, "ts1")], [5])

    def test_a_version_nobody_knows_is_no_commit_of_something_else(self) -> None:
        with pytest.raises(ValueError, match="version 5"):
            parse([self.record(self.KEY, b"\x00\x05" + self.PLAIN[2:])], "group", "topic")


class TestPermits:
    """I9, by what a member says."""

    @staticmethod
    def state(in_use: int, *windows: int | None, in_flight: int = 0, available: int | None = None) -> dict[str, Any]:
        left = 100 - in_use if available is None else available
        partitions = [{"window": window, "in_flight": in_flight} for window in windows]
        limiter = {"limit": 100, "in_use": in_use, "available": left}
        return {"state": "running", "limiter": limiter, "partitions": partitions}

    @pytest.mark.parametrize("state", [state(0), state(100, 50, 50), state(60, 50, None, 0), state(50, 50)], ids=str)
    def test_as_many_as_there_are_is_right_also_while_a_window_that_is_listed_no_more_ends(
        self, state: dict[str, Any]
    ) -> None:
        assert permits_out_of_bounds(state) is None

    def test_only_at_work_each_window_has_its_permits_as_a_drained_one_is_listed_until_all_are(self) -> None:
        assert permits_out_of_bounds(self.state(50, 50, 50) | {"state": "rebalancing"}) is None

    @pytest.mark.parametrize(
        "state",
        [
            state(-1),
            state(101, available=-1),
            state(50, 50, available=51),
            state(50, 50, 50),
            state(50, -1),
            state(50, 50, in_flight=51),
            state(50, None, in_flight=1),
        ],
        ids=str,
    )
    def test_too_many_and_too_few_are_found(self, state: dict[str, Any]) -> None:
        assert permits_out_of_bounds(state) is not None

    def test_what_is_in_use_and_nobody_s_window_is_astray(self) -> None:
        assert permits_astray(self.state(60, 50, None, 10)) == 0
        assert permits_astray(self.state(61, 50, None, 10)) == 1
        assert permits_astray(self.state(1)) == 1


class TestTendency:
    """I11: only of a member that has lived long enough, and how many have is told."""

    def test_a_short_life_has_none_whatever_it_has_grown_by(self) -> None:
        short = [number * 10**9 for number in range(MEMORY_SAMPLES_MIN - 1)]

        assert (has_tendency(short), growth_of(short)) == (False, 0)

    def test_a_long_one_has_grown_by_the_difference_of_its_last_quarter_to_its_second(self) -> None:
        grown = [0] * 6 + [100] * 6 + [500] * 6 + [170] * 6

        assert (has_tendency(grown), growth_of(grown)) == (True, 70)


def test_a_member_of_a_fleet_beside_is_missed_and_measured_too_while_the_plan_of_another_is_played() -> None:
    """I11, I12: what is done to a broker is done to all of them."""
    stage: Any = SimpleNamespace(ledger=SimpleNamespace(partition_count=4))
    first, second = Fleet(stage), Fleet(stage)
    first.beside = [second]

    def member(place: int, code: int | None) -> Member:
        process = SimpleNamespace(poll=lambda: code)
        log = SimpleNamespace(read_text=lambda **_: "")
        service: Any = SimpleNamespace(process=process, log=log, obituary=lambda: "it fell", memory=lambda: 7)
        return Member(place, service, f"m{place}")

    second.members = {0: member(0, 3), 1: member(1, None)}
    first.look_after()

    assert second.wrong == ["I12: member 0 (m0) ended unasked: it fell"]
    assert second.members[1].memory == [7]


class Judged(Ledger):
    """A ledger of what is put into it: two partitions of everything, and no broker."""

    def __init__(self) -> None:
        super().__init__(broker=cast("Broker", None), input="in", output="out", dead_letter="dead")

    def __post_init__(self) -> None:
        self.partition_count = 2
        self._output = self._dead_letter = cast("Reader", SimpleNamespace(partition_count=2))

    def put(self, kind: str, statuses: set[int], **more: Any) -> Entry:
        """Enter a record."""
        entry = Entry("in", 1, len(self.entries), b"k", b"value", [("h", b"1")], None, kind, frozenset(statuses), 5)
        entry = replace(entry, **more)
        self.entries[entry.id] = entry
        return entry

    def respond(self, entry: Entry, status: int, result: tuple[str, Any], key: str | None = None) -> None:
        """Answer it."""
        kind = None if entry.kind == "unknown" else entry.kind
        source = {"topic": "in", "partition": 1, "offset": entry.offset}
        response = {"index": entry.offset, "source": source, "request_id": None, "context": None}
        response |= {"kind": kind, "key": key, "status": status, "result": result, "completed_at": 0}
        said = {"response-id": entry.id, "status": status, "kind": kind or "unknown"}
        headers: Headers = [(f"tierstream-{name}", str(value).encode()) for name, value in said.items()]
        self.answers[entry.id].append(Answer(1, 0, b"k", wire.datum("response", response), headers, 0))

    def bury(self, entry: Entry, code: str, **changed: Any) -> None:
        """Dead-letter it, otherwise than it was where that is *changed*."""
        said = {"topic": "in", "partition": 1, "offset": entry.offset, "timestamp": 5, "code": code}
        headers = [*entry.headers, *((f"tierstream-dlq-{name}", str(value).encode()) for name, value in said.items())]
        letter = replace(Answer(1, 0, entry.key, entry.value, headers, 0), **changed)
        self.dead_letters[entry.id].append(letter)


def failure(code: str) -> tuple[str, Any]:
    """The result of what has failed."""
    return "Failure", {"code": code, "message": "", "retriable": False}


def got(payload: bytes | dict[str, Any], size: int) -> tuple[str, Any]:
    """The result of a get."""
    return "Got", {"object": {"metadata": {**wire.METADATA, "size": size}, "payload": payload}}


class TestResponses:
    """I3 and I7: an answer is the answer to its own record, and brings what the object holds."""

    def judge(self, status: int, result: tuple[str, Any], key: str | None = "mine", kind: str = "get") -> list[str]:
        ledger = Judged()
        entry = ledger.put(kind, {200, 201, 204, 404, 503}, object_key="mine", content=Content.of(b"bytes"))
        ledger.respond(entry, status, result, key)
        return ledger.verdict().mismatched

    def test_the_whole_payload_under_its_own_key_is_right(self) -> None:
        assert self.judge(200, got(b"bytes", 5)) == []

    def test_another_object_s_key_or_bytes_are_found_though_everything_else_is_right(self) -> None:
        (key,) = self.judge(200, got(b"bytes", 5), key="yours")
        (content,) = self.judge(200, got(b"other", 5))

        assert key == "in/1/0: object key is 'yours', not 'mine'"
        assert content.startswith("in/1/0: payload is Content(size=5")

    def test_no_key_is_another_key(self) -> None:
        assert self.judge(200, got(b"bytes", 5), key=None) != []

    def test_sizes_are_compared_where_there_is_no_payload(self) -> None:
        here = {**wire.METADATA, "size": 5}

        assert self.judge(201, ("Inserted", {"metadata": here}), kind="insert") == []
        assert self.judge(201, ("Inserted", {"metadata": here | {"size": 4}}), kind="insert") != []
        assert self.judge(204, ("Headed", {"metadata": here | {"size": 6}}), kind="head") != []
        reference = {"uri": "file:///p", "size": 5, "crc32c": None}
        assert self.judge(200, got(reference, 5)) == []
        assert self.judge(200, got(reference | {"size": 7}, 5)) != []

    def test_what_is_not_there_and_what_has_failed_holds_nothing_to_compare(self) -> None:
        assert self.judge(404, ("Got", {"object": None})) == []
        assert self.judge(204, ("Deleted", {}), kind="delete") == []
        assert self.judge(503, failure("backend_unavailable")) == []


class Storage(Judged):
    """Answers each get: with what the object holds, or with what another one does, the same in all."""

    def __init__(self, *, mixed_up: bool) -> None:
        super().__init__()
        self._mixed_up = mixed_up

    def operate(self, kind: str, object_key: str | None = None, payload: Any = b"", **asked: Any) -> list[Entry]:
        assert (kind, payload, object_key is None) == ("get", b"", False)
        return [self.put(kind, asked["statuses"], object_key=object_key, content=Content.of(asked["holds"]))]

    def flush(self, seconds: float = 60) -> None:
        entries = list(self.entries.values())
        held = [payload_of(str(entry.object_key)) for entry in entries]
        for entry, payload in zip(entries, held[::-1] if self._mixed_up else held, strict=True):
            self.respond(entry, 200, got(payload, len(payload)), entry.object_key)


def test_objects_that_hold_each_other_s_payloads_are_not_read_back() -> None:
    """I7: though all payloads are there, and each once."""
    for mixed_up in (False, True):
        load = Load(Storage(mixed_up=mixed_up))
        load.kept = [(1, f"object/{number}") for number in range(10)]
        if mixed_up:
            with pytest.raises(AssertionError, match="payload is Content"):
                read_back(load, 10)
        else:
            read_back(load, 10)


class TestDeadLetters:
    """Contract 2.2: each record that deserves one has it, whole, and no other record has."""

    def test_poison_with_its_record_as_it_was_is_right(self) -> None:
        ledger = Judged()
        poison = ledger.put("unknown", {400})
        ledger.respond(poison, 400, failure("decode_error"))
        ledger.bury(poison, "decode_error")
        failed = ledger.put("insert", {502})
        ledger.respond(failed, 502, failure("backend_error"))
        ledger.bury(failed, "backend_error")

        verdict = ledger.verdict()

        assert (verdict.letters_missing, verdict.letters_repeated, verdict.letters_mismatched) == ([], {}, [])

    @pytest.mark.parametrize(("kind", "code"), [("unknown", "payload_too_large"), ("get", "panic")])
    def test_a_record_without_one_is_found_by_what_it_is_or_by_its_answer(self, kind: str, code: str) -> None:
        ledger = Judged()
        entry = ledger.put(kind, set())
        ledger.respond(entry, 500, failure(code))

        assert ledger.verdict().letters_missing == [entry.id]

    def test_a_second_one_is_counted(self) -> None:
        ledger = Judged()
        entry = ledger.put("unknown", {400})
        for _ in range(3):
            ledger.bury(entry, "decode_error")

        assert ledger.verdict().letters_repeated == {entry.id: 2}

    @pytest.mark.parametrize(
        "changed", [{"key": None}, {"value": b"valu"}, {"value": None}, {"partition": 0}], ids=str
    )
    def test_one_that_is_not_its_record_is_found(self, changed: dict[str, Any]) -> None:
        ledger = Judged()
        entry = ledger.put("unknown", {400})
        ledger.respond(entry, 400, failure("decode_error"))
        ledger.bury(entry, "decode_error", **changed)

        (wrong,) = ledger.verdict().letters_mismatched
        assert wrong.startswith(f"dead letter of {entry.id}: {next(iter(changed))} is")

    def test_one_without_the_record_s_headers_or_its_time_is_found(self) -> None:
        ledger = Judged()
        entry = ledger.put("unknown", {400})
        ledger.respond(entry, 400, failure("decode_error"))
        ledger.bury(entry, "decode_error", headers=[("tierstream-dlq-code", b"decode_error")])

        assert [wrong.split()[4] for wrong in ledger.verdict().letters_mismatched] == ["headers", "timestamp"]

    def test_one_that_nobody_deserves_is_found(self) -> None:
        ledger = Judged()
        entry = ledger.put("get", {404})
        ledger.respond(entry, 404, ("Got", {"object": None}))
        ledger.bury(entry, "decode_error")
        stranger = ledger.put("unknown", {400})
        ledger.bury(stranger, "decode_error")
        del ledger.entries[stranger.id]

        lost, undeserved = ledger.verdict().letters_mismatched

        assert lost == f"{stranger.id}: a dead letter of no record"
        assert undeserved.endswith("because of decode_error, but it is answered with {None}")


PLANS: dict[str, Callable[[int], Plan]] = {
    "kills": lambda seed: chaos_plan.kills(seed, 20),
    "stops": lambda seed: chaos_plan.stops(seed, 20),
    "brokers": chaos_plan.brokers,
    "leaders": lambda seed: chaos_plan.leaders(seed, 300),
    "storm": lambda seed: chaos_plan.storm(seed, 120),
    "mixed": lambda seed: chaos_plan.mixed(seed, 600),
    "mixed exactly-once": lambda seed: chaos_plan.mixed(seed, 600, delivery="exactly-once"),
}


class TestPlans:
    """A seed is a plan, and a plan can be carried out."""

    @pytest.mark.parametrize("name", PLANS)
    def test_a_seed_gives_the_same_plan_again_and_another_seed_another_one(self, name: str) -> None:
        assert PLANS[name](3) == PLANS[name](3)
        assert PLANS[name](3) != PLANS[name](5)

    @pytest.mark.parametrize("name", PLANS)
    def test_what_begins_also_ends_and_nothing_is_done_to_who_is_not_there(self, name: str) -> None:
        for seed in range(50):
            there, frozen, dead, away = set[int](), set[int](), set[int](), set[str]()
            node = -1
            for action in PLANS[name](seed):
                assert action.wait >= 0
                match action.kind:
                    case "start":
                        assert action.member not in there
                        there.add(action.member)
                    case "open":
                        assert action.member in there
                    case "kill" | "stop":
                        assert action.member in there - frozen
                        there.remove(action.member)
                        dead |= {action.member}
                    case "bury":
                        assert action.member in dead
                    case "freeze":
                        assert action.member in there - frozen
                        frozen.add(action.member)
                    case "thaw":
                        frozen.remove(action.member)
                    case "hold storage" | "stop broker" | "kill broker" | "freeze broker" | "slow output":
                        what = action.kind.rpartition(" ")[2]
                        assert what not in away
                        away.add(what)
                        node = action.member
                    case "start broker" | "thaw broker":
                        assert action.member == node, "another node came back than went"
                        away.remove("broker")
                    case "sync brokers":
                        assert not away
                    case "lose answer":
                        assert action.request in REQUESTS
                    case _:
                        away.remove(action.kind.rpartition(" ")[2])
            assert there
            assert not frozen
            assert not away

    def test_a_storm_is_never_empty_nor_larger_than_asked_for_and_does_everything(self) -> None:
        for seed in range(20):
            there: set[int] = set()
            plan = chaos_plan.storm(seed, 600, members=3)
            for action in plan:
                there = there | {action.member} if action.kind == "start" else there
                there = there - {action.member} if action.kind in {"kill", "stop"} else there
                assert 1 <= len(there) <= 3
            assert {action.kind for action in plan} == {"start", "kill", "stop", "bury"}
            assert 590 <= sum(action.wait for action in plan) <= 600.2

    def test_ten_minutes_of_everything_hold_everything(self) -> None:
        everything = {
            *("start", "kill", "bury", "stop", "freeze", "thaw", "stop broker", "kill broker", "freeze broker"),
            *("start broker", "thaw broker", "hold storage", "release storage", "lose answer"),
            *("slow output", "quick output"),
        }
        drawn = [{action.kind for action in chaos_plan.mixed(seed, 600)} for seed in range(20)]

        assert all(kinds == everything for kinds in drawn)

    @pytest.mark.parametrize("delivery", chaos_plan.ANSWERED_REQUESTS)
    def test_five_minutes_of_everything_lose_every_answer_there_is_to_members_of_this_kind_and_no_other(
        self, delivery: chaos_plan.Delivery
    ) -> None:
        asked = set(chaos_plan.ANSWERED_REQUESTS[delivery])
        plans = [chaos_plan.mixed(seed, 300, delivery=delivery) for seed in range(50)]

        assert all({action.request for action in plan if action.kind == "lose answer"} == asked for plan in plans)
        assert all(not action.request for plan in plans for action in plan if action.kind != "lose answer")

    def test_a_storage_is_held_while_a_drain_that_somebody_causes_runs_out_of_time(self) -> None:
        """Somebody comes or goes early enough: a dead one is missed after a session, and a drain takes what it may."""
        held = 0
        for seed in range(50):
            now, holding, causes = 0.0, -1.0, [0.0]
            for action in chaos_plan.mixed(seed, 900):
                now += action.wait
                if action.kind == "hold storage":
                    holding, causes = now, []
                elif action.kind in {"start", "kill", "stop"}:
                    causes.append(now)
                elif action.kind == "release storage" and now < 899:  # else the plan's end has cut it short
                    assert holding <= causes[0] <= now - SESSION_SECONDS - DRAIN_SECONDS
                    held += 1
        assert held > 100

    def test_kills_lie_so_far_apart_that_as_much_as_asked_is_answered_before_the_last_one(self) -> None:
        for seed in range(20):
            near, far = chaos_plan.kills(seed, 20), chaos_plan.kills(seed, 20, records=40_000)
            assert [replace(action, answers=0) for action in far] == [replace(action, answers=0) for action in near]
            assert 40_000 <= sum(action.answers for action in far) < 40_000 + len(far)
            assert chaos_plan.kills(seed, 20, records=1) == near, "they need not"

    def test_every_node_of_a_cluster_meets_every_fault_in_nine_rounds_and_has_caught_up_before_the_next(self) -> None:
        for seed in range(20):
            drawn = chaos_plan.leaders(seed, 9 * chaos_plan.NODE_ROUND_SECONDS)
            plan = [action for action in drawn if "broker" in action.kind]
            faults, back, synced = plan[::3], plan[1::3], plan[2::3]

            assert sorted((fault.kind, fault.member) for fault in faults) == sorted(
                (kind, node) for kind in ("stop broker", "kill broker", "freeze broker") for node in range(3)
            )
            assert [one.kind == "thaw broker" for one in back] == [one.kind == "freeze broker" for one in faults]
            assert {one.kind for one in synced} == {"sync brokers"}
            assert all(fault.answers and fault.burst for fault in faults), "there is something in flight"

    def test_also_the_shortest_plan_for_a_cluster_holds_three_faults(self) -> None:
        assert sum(action.kind == "sync brokers" for action in chaos_plan.leaders(1, 0)) == 3

    def test_a_timeline_reads_like_one(self) -> None:
        actions = [Action("kill", 2), Action("stop broker"), Action("lose answer", request="EndTxn")]
        assert [str(action) for action in actions] == ["kill 2", "stop broker", "lose answer to EndTxn"]
