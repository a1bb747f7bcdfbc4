"""The judges of the chaos tests see what they are there to see, and nothing where all is well."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import chaos_plan
from chaos_plan import Action, Plan
from group_history import Commit, GroupHistory, parse
from invariants import (
    Arrival,
    Reply,
    busy_moments,
    commits_gone_back,
    commits_past_unanswered,
    longest_silence,
    repeats_below_commit,
    repeats_unexplained,
)
from ledger import Answer

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

    def test_another_partition_answers_for_nobody_else(self) -> None:
        assert commits_past_unanswered([Arrival(1, 0, 0)], REPLIES, [Commit(1, 1, 999)]) != []

    def test_a_commit_that_goes_back_is_found_though_the_next_one_mends_it(self) -> None:
        """Which is what a look every 100 ms may miss."""
        commits = [Commit(0, 3, 1), Commit(1, 1, 1), Commit(0, 2, 2), Commit(0, 4, 3)]

        assert commits_gone_back(commits) == ["partition 0: committed 2 after 3"]


class TestRepeats:
    """I5 and I6."""

    def test_a_repeat_of_what_was_not_committed_is_explained_by_a_fault_after_the_first(self) -> None:
        replies = [*REPLIES, Reply(0, 3, 300)]
        commits = [Commit(0, 3, 130)]

        assert repeats_unexplained(replies, commits, [200]) == 0
        assert repeats_unexplained(replies, commits, [139]) == 1, "the fault came before the first answer"
        assert repeats_unexplained(replies, [Commit(0, 4, 150)], [200]) == 1, "it was committed when the fault came"

    def test_each_fault_explains_one_repeat(self) -> None:
        replies = [*REPLIES, Reply(0, 3, 300), Reply(0, 3, 400)]

        assert repeats_unexplained(replies, [], [200]) == 1
        assert repeats_unexplained(replies, [], [200, 350]) == 0

    def test_an_answer_below_a_commit_is_found(self) -> None:
        late = Reply(0, 1, 200)

        assert repeats_below_commit([*REPLIES, late], [Commit(0, 2, 150)]) == [late]
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


PLANS: dict[str, Callable[[int], Plan]] = {
    "kills": lambda seed: chaos_plan.kills(seed, 20),
    "stops": lambda seed: chaos_plan.stops(seed, 20),
    "brokers": chaos_plan.brokers,
    "leaders": lambda seed: chaos_plan.leaders(seed, 300),
    "storm": lambda seed: chaos_plan.storm(seed, 120),
    "mixed": lambda seed: chaos_plan.mixed(seed, 600),
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
                    case "hold storage" | "stop broker" | "kill broker" | "freeze broker":
                        what = action.kind.rpartition(" ")[2]
                        assert what not in away
                        away.add(what)
                        node = action.member
                    case "start broker" | "thaw broker":
                        assert action.member == node, "another node came back than went"
                        away.remove("broker")
                    case "sync brokers":
                        assert not away
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
            *("start broker", "thaw broker", "hold storage", "release storage"),
        }
        drawn = [{action.kind for action in chaos_plan.mixed(seed, 600)} for seed in range(20)]

        assert all(kinds == everything for kinds in drawn)

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
        assert [str(Action("kill", 2)), str(Action("stop broker"))] == ["kill 2", "stop broker"]
