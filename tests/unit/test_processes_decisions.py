"""What the supervisor decides: starts, restarts with growing waits, stops and kills, and the exit code of it all."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from consumer.processes.decisions import (
    ENDS_MAX,
    RESTART_SECONDS,
    RESTART_SECONDS_MAX,
    SILENCES_MAX,
    STABLE_SECONDS,
    Action,
    AskToStop,
    Decisions,
    End,
    Kill,
    Start,
)

STOP_SECONDS = 40.0


def begun(processes: int = 2, chance: float = 1.0) -> Decisions:
    """Decisions about processes that have all been started."""
    decisions = Decisions(processes, STOP_SECONDS, chance=lambda: chance)
    assert decisions.begin() == [Start(number) for number in range(1, processes + 1)]
    return decisions


def running(processes: int = 2, chance: float = 1.0) -> Decisions:
    """Decisions about processes that are all in the group since the moment 0."""
    decisions = begun(processes, chance)
    for number in range(1, processes + 1):
        decisions.heard(number, 0.0, running=True)
    return decisions


def restart(decisions: Decisions, number: int, code: int, now: float) -> float:
    """Let a process end with *code*, and start it when that is due; return the wait."""
    assert decisions.ended(number, code, now) == []
    due = decisions.next_due()
    assert due is not None
    assert decisions.tick(due - 0.001) == []
    assert decisions.tick(due) == [Start(number)]
    return due - now


class TestRestarts:
    """A process that ends without being asked to is started again, not too often."""

    @pytest.mark.parametrize("code", [3, 1, 0, 143, -9, -11])
    def test_whatever_ends_a_process_that_was_running_it_is_started_again(self, code: int) -> None:
        decisions = running()

        assert restart(decisions, 2, code, now=1.0) == RESTART_SECONDS

    def test_waits_double_from_end_to_end_up_to_a_bound(self) -> None:
        decisions = running()

        waits = [restart(decisions, 1, 3, now=1.0) for _ in range(ENDS_MAX - 1)]

        assert waits == [min(RESTART_SECONDS_MAX, RESTART_SECONDS * 2**number) for number in range(ENDS_MAX - 1)]
        assert waits[-1] == RESTART_SECONDS_MAX

    def test_waits_are_jittered_over_their_upper_half(self) -> None:
        shortest, longest = (restart(running(chance=chance), 1, 3, now=1.0) for chance in (0.0, 1.0))

        assert (shortest, longest) == (RESTART_SECONDS / 2, RESTART_SECONDS)

    def test_a_process_that_ran_long_enough_has_a_clean_record(self) -> None:
        decisions = running()
        for _ in range(ENDS_MAX - 1):
            restart(decisions, 1, 3, now=1.0)
        for now in (100.0, 130.0, 100.0 + STABLE_SECONDS):
            decisions.heard(1, now, running=True)

        assert restart(decisions, 1, 3, now=100.0 + STABLE_SECONDS) == RESTART_SECONDS

    def test_a_process_that_did_not_run_long_enough_has_not(self) -> None:
        decisions = running()
        restart(decisions, 1, 3, now=1.0)
        decisions.heard(1, 100.0, running=True)

        assert restart(decisions, 1, 3, now=100.0 + STABLE_SECONDS - 1) == 2 * RESTART_SECONDS

    def test_a_process_that_only_starts_for_long_has_not(self) -> None:
        decisions = begun()
        restart(decisions, 1, 3, now=1.0)
        decisions.heard(1, 2.0, running=False)

        assert restart(decisions, 1, 3, now=2.0 + 2 * STABLE_SECONDS) == 2 * RESTART_SECONDS

    def test_too_many_ends_in_a_row_stop_all_with_3_and_say_why(self) -> None:
        decisions = running()
        for _ in range(ENDS_MAX - 1):
            restart(decisions, 1, -9, now=1.0)

        assert decisions.ended(1, -9, 1.0) == [AskToStop(2)]
        assert decisions.ended(2, 0, 2.0) == [End(3)]
        assert decisions.cause == f"process 1 ended by SIGKILL, {ENDS_MAX} times in a row"

    def test_the_ends_of_one_process_are_not_held_against_another(self) -> None:
        decisions = running()
        for _ in range(ENDS_MAX - 1):
            restart(decisions, 1, 3, now=1.0)

        assert restart(decisions, 2, 3, now=1.0) == RESTART_SECONDS

    def test_what_is_due_first_is_waited_for(self) -> None:
        decisions = running()
        restart(decisions, 1, 3, now=1.0)
        decisions.ended(1, 3, 10.0)
        decisions.ended(2, 3, 10.5)

        assert decisions.next_due() == 10.5 + RESTART_SECONDS
        assert decisions.tick(12.0) == [Start(1), Start(2)]
        assert decisions.next_due() is None

    def test_words_tell_how_it_ended_and_when_it_comes_back(self) -> None:
        decisions = running()
        decisions.ended(1, 3, 10.0)
        decisions.ended(2, -64, 10.0)

        assert decisions.words(1, 10.0) == "ended with exit code 3, starts again in 1 s"
        assert decisions.words(2, 20.0) == "ended by SIGRTMAX, starts again in 0 s"


class TestEnds:
    """Ends of a process that end all of them."""

    def test_a_configuration_nobody_can_start_with_is_not_tried_again(self) -> None:
        decisions = begun()

        assert decisions.ended(1, 2, 1.0) == [AskToStop(2)]
        assert decisions.ended(2, 2, 1.1) == [End(2)]
        assert decisions.cause == "process 1 cannot be started with this configuration"

    def test_a_restart_that_finds_another_world_is_not_tried_again(self) -> None:
        decisions = running()
        restart(decisions, 1, 3, now=1.0)

        assert decisions.ended(1, 2, 3.0) == [AskToStop(2)]

    def test_the_code_of_a_wrong_configuration_after_running_is_a_crash_like_any_other(self) -> None:
        assert restart(running(), 1, 2, now=1.0) == RESTART_SECONDS

    @pytest.mark.parametrize("make", [begun, running])
    def test_the_poison_limit_stops_all_with_4(self, make: Callable[[int], Decisions]) -> None:
        decisions = make(3)

        assert decisions.ended(2, 4, 1.0) == [AskToStop(1), AskToStop(3)]
        assert decisions.ended(1, 0, 2.0) == []
        assert decisions.ended(3, 1, 3.0) == [End(4)]
        assert decisions.cause == "process 2 stopped: too many poison records"

    def test_the_last_one_alive_ends_it_without_being_asked(self) -> None:
        decisions = running(1)

        assert decisions.ended(1, 4, 1.0) == [End(4)]

    def test_a_process_that_waits_for_its_restart_is_not_asked_to_stop(self) -> None:
        decisions = running()
        decisions.ended(1, 3, 1.0)

        assert decisions.ended(2, 4, 1.1) == [End(4)]


class TestStop:
    """Signals, and what a stop comes to."""

    @pytest.mark.parametrize(
        ("codes", "verdict"),
        [
            ((0, 0), 0),
            ((0, 1), 1),
            ((-9, 0), 1),
            ((143, 0), 1),
            ((0, 3), 3),
            ((3, 4), 4),
            ((2, 1), 2),
        ],
    )
    def test_a_stop_ends_with_the_gravest_of_the_exit_codes(self, codes: tuple[int, int], verdict: int) -> None:
        decisions = running()

        assert decisions.signalled(signal.SIGTERM, 5.0) == [AskToStop(1), AskToStop(2)]
        assert decisions.ended(1, codes[0], 6.0) == []
        assert decisions.ended(2, codes[1], 7.0) == [End(verdict)]
        assert decisions.cause is None

    def test_nothing_is_started_any_more(self) -> None:
        decisions = running()
        decisions.ended(1, 3, 1.0)

        assert decisions.signalled(signal.SIGTERM, 1.1) == [AskToStop(2)]
        assert decisions.tick(30.0) == []
        assert decisions.words(1, 30.0) == "ended with exit code 3"
        assert decisions.ended(2, 0, 30.0) == [End(0)], "the crash before the stop has been dealt with"

    def test_a_stop_while_nobody_lives_ends_at_once(self) -> None:
        decisions = running(1)
        decisions.ended(1, 3, 1.0)

        assert decisions.signalled(signal.SIGINT, 1.1) == [End(0)]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_second_signal_kills_what_still_runs(self, number: int, code: int) -> None:
        decisions = running(3)
        decisions.signalled(signal.SIGTERM, 1.0)
        decisions.ended(2, 0, 2.0)

        assert decisions.signalled(number, 2.1) == [Kill(1), Kill(3), End(code, at_once=True)]

    def test_a_signal_during_a_stop_for_another_reason_does_not_wait_for_it(self) -> None:
        decisions = running()
        decisions.ended(1, 4, 1.0)

        assert decisions.signalled(signal.SIGTERM, 2.0) == [Kill(2), End(143, at_once=True)]

    def test_the_deadline_kills_what_still_runs_and_is_a_failure(self) -> None:
        decisions = running()
        decisions.signalled(signal.SIGTERM, 5.0)
        decisions.ended(1, 0, 6.0)

        assert decisions.next_due() == 5.0 + STOP_SECONDS
        assert decisions.tick(5.0 + STOP_SECONDS - 0.1) == []
        assert decisions.tick(5.0 + STOP_SECONDS) == [Kill(2), End(1, at_once=True)]

    def test_the_deadline_of_a_stop_with_a_cause_keeps_its_exit_code(self) -> None:
        decisions = running()
        decisions.ended(1, 4, 5.0)

        assert decisions.tick(5.0 + STOP_SECONDS) == [Kill(2), End(4, at_once=True)]


class TestSilence:
    """A process can be hung though it lives."""

    def silences(self, decisions: Decisions, count: int) -> list[Action]:
        """Let process 1 leave *count* questions unanswered."""
        return [action for _ in range(count) for action in decisions.silent(1)]

    def test_a_process_that_never_answers_is_killed_once_and_started_again(self) -> None:
        decisions = running()

        assert self.silences(decisions, SILENCES_MAX - 1) == []
        assert self.silences(decisions, 3) == [Kill(1)]
        assert restart(decisions, 1, -9, now=70.0) == RESTART_SECONDS

    def test_an_answer_in_between_is_a_sign_of_life(self) -> None:
        decisions = running()
        self.silences(decisions, SILENCES_MAX - 1)
        decisions.heard(1, 60.0, running=True)

        assert self.silences(decisions, SILENCES_MAX - 1) == []

    def test_a_new_run_begins_with_a_clean_record(self) -> None:
        decisions = running()
        self.silences(decisions, SILENCES_MAX - 1)
        restart(decisions, 1, -9, now=60.0)

        assert self.silences(decisions, SILENCES_MAX - 1) == []

    def test_a_stop_has_a_deadline_of_its_own(self) -> None:
        decisions = running()
        decisions.signalled(signal.SIGTERM, 1.0)

        assert self.silences(decisions, 2 * SILENCES_MAX) == []
