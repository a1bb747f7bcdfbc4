"""The bytes held at once are bounded, and nobody who could free some ever waits for them."""

from __future__ import annotations

import asyncio

import pytest

from consumer.budget import ByteBudget


async def turns(number: int = 5) -> None:
    """Let every task that can run do so."""
    for _ in range(number):
        await asyncio.sleep(0)


def test_charges_add_up_and_come_back() -> None:
    """Contract 4: what is charged is exactly what is held."""
    budget = ByteBudget(100)

    budget.charge(30)
    budget.charge(20)
    budget.release(30)

    assert budget.used == 20


def test_fetching_stops_at_half_and_goes_on_at_three_eighths() -> None:
    """H7: a pause drops what the client has prefetched, so there is room between the two."""
    budget = ByteBudget(80)
    seen = []
    for used in range(81):
        seen.append((budget.fetching_stopped, budget.fetching_may_resume))
        budget.charge(1)
        assert budget.used == used + 1

    assert [stopped for stopped, _ in seen] == [used >= 40 for used in range(81)]
    assert [resume for _, resume in seen] == [used <= 30 for used in range(81)]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_a_tiny_budget_still_lets_one_record_in_at_a_time(limit: int) -> None:
    """Contract 4: one charge above the whole budget runs alone; an empty budget stops nobody."""
    budget = ByteBudget(limit)

    def state() -> tuple[bool, bool]:
        return budget.fetching_stopped, budget.fetching_may_resume

    assert state() == (False, True)
    budget.charge(1_000)
    assert state() == (True, False)
    budget.release(1_000)
    assert state() == (False, True)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_budget_of_nothing_is_refused(limit: int) -> None:
    """It could admit nothing, or everything; both are mistakes."""
    with pytest.raises(ValueError, match="at least 1 byte"):
        ByteBudget(limit)


async def test_a_read_waits_for_room_and_takes_it() -> None:
    """Contract 4: reads of unknown size reserve before they start."""
    budget = ByteBudget(100)
    await budget.reserve_read(60)
    second = asyncio.create_task(budget.reserve_read(60))
    await turns()
    assert not second.done()
    assert budget.used == 60

    budget.release_read(60)
    await second

    assert budget.used == 60


async def test_a_read_that_just_fits_does_not_wait() -> None:
    """The limit is reached, not passed."""
    budget = ByteBudget(100)
    await budget.reserve_read(60)
    await asyncio.wait_for(budget.reserve_read(40), 1)

    assert budget.used == budget.limit


async def test_a_read_larger_than_the_budget_runs_alone() -> None:
    """Contract 4: it would never fit; so it waits only for other reads, and others wait for it."""
    budget = ByteBudget(100)
    await asyncio.wait_for(budget.reserve_read(250), 1)
    small = asyncio.create_task(budget.reserve_read(1))
    await turns()
    assert not small.done()

    budget.release_read(250)
    await small

    assert budget.used == 1


async def test_records_that_wait_never_keep_the_first_read_waiting() -> None:
    """They wait for that very read: waiting for them in turn would be for ever."""
    budget = ByteBudget(100)
    budget.charge(10_000)

    await asyncio.wait_for(budget.reserve_read(50), 1)

    assert budget.used == 10_050


async def test_bytes_of_any_kind_let_a_waiting_read_in() -> None:
    """A response acknowledged frees as much as a read that ends."""
    budget = ByteBudget(100)
    budget.charge(50)
    await budget.reserve_read(50)
    waiting = asyncio.create_task(budget.reserve_read(30))
    await turns()

    budget.release(10)
    await turns()
    assert not waiting.done()
    budget.release(20)
    await waiting

    assert budget.used == 100


async def test_an_answer_that_is_not_acknowledged_keeps_further_reads_waiting() -> None:
    """I11: with a slow output topic, reads that are quick would pile up all that they bring back."""
    budget = ByteBudget(100)
    await budget.reserve_read(60)
    budget.answer_read(60, 80)
    assert budget.used == 80
    waiting = asyncio.create_task(budget.reserve_read(60))
    await turns()
    assert not waiting.done()

    budget.release_read(80)
    await waiting

    assert budget.used == 60


async def test_an_answer_smaller_than_its_reservation_lets_others_in() -> None:
    """What is reserved is the most that a read may bring."""
    budget = ByteBudget(100)
    await budget.reserve_read(60)
    waiting = asyncio.create_task(budget.reserve_read(60))
    await turns()

    budget.answer_read(60, 10)
    await waiting

    assert budget.used == 70


async def test_all_waiting_reads_that_fit_are_let_in_together() -> None:
    """Those that do not fit go on waiting, and are not forgotten."""
    budget = ByteBudget(100)
    await budget.reserve_read(100)
    waiting = [asyncio.create_task(budget.reserve_read(40)) for _ in range(3)]
    await turns()

    budget.release_read(100)
    await turns()
    assert [task.done() for task in waiting] == [True, True, False]

    budget.release_read(40)
    await asyncio.gather(*waiting)
    assert budget.used == 80


async def test_a_cancelled_wait_charges_nothing_and_hides_nothing() -> None:
    """As documented; and the next in line hears of the room that the cancelled one would have had."""
    budget = ByteBudget(100)
    await budget.reserve_read(100)
    given_up, patient = (asyncio.create_task(budget.reserve_read(100)) for _ in range(2))
    await turns()

    budget.release_read(100)
    given_up.cancel()
    await asyncio.wait([given_up])
    await asyncio.wait_for(patient, 1)

    assert given_up.cancelled()
    assert budget.used == 100


async def test_giving_back_too_much_is_noticed_at_once() -> None:
    """A budget below zero would admit for ever what it is there to bound."""
    budget = ByteBudget(100)
    budget.charge(5)
    with pytest.raises(AssertionError, match="more bytes"):
        budget.release(6)
    with pytest.raises(AssertionError, match="more reads"):
        ByteBudget(100).release_read(0)
