"""The poison gauge against a model that keeps everything."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consumer.poison import PoisonGauge, PoisonPolicy

RATIOS = st.integers(min_value=0, max_value=100).map(lambda percent: percent / 100)
POLICIES = st.builds(
    PoisonPolicy,
    max_consecutive=st.none() | st.integers(min_value=1, max_value=6),
    max_ratio=st.none() | RATIOS,
    ratio_window=st.integers(min_value=1, max_value=20) | st.just(100),
)


def limit_of(policy: PoisonPolicy, records: list[bool]) -> int | None:
    """How many of *records* are worked on until a limit is reached; None where none is: the contract, word for word."""
    for seen in range(1, len(records) + 1):
        run = policy.max_consecutive
        if run is not None and seen >= run and all(records[seen - run : seen]):
            return seen
        window = policy.ratio_window
        if policy.max_ratio is not None and seen >= window:
            share = Decimal(sum(records[seen - window : seen])) / Decimal(window)
            if share > Decimal(str(policy.max_ratio)):
                return seen
    return None


def reached(policy: PoisonPolicy, records: list[bool]) -> int | None:
    """How many of *records* the gauge lets through, the last one included."""
    gauge = PoisonGauge(policy)
    for seen, poison in enumerate(records, 1):
        if gauge.add(poison=poison) is not None:
            return seen
    return None


@given(policy=POLICIES, records=st.lists(st.booleans(), max_size=250))
@example(policy=PoisonPolicy(max_ratio=0.29, ratio_window=100), records=[True] * 29 + [False] * 71)
@example(policy=PoisonPolicy(max_ratio=1.0, ratio_window=3), records=[True] * 10)
@example(policy=PoisonPolicy(max_ratio=0.0, ratio_window=3), records=[False, False, True])
def test_it_stops_where_the_contract_says(policy: PoisonPolicy, records: list[bool]) -> None:
    """Contract 6: the N-th in a row; a share above max_ratio, from the first full window on."""
    assert reached(policy, records) == limit_of(policy, records)


@given(records=st.lists(st.booleans(), max_size=500), window=st.integers(min_value=1, max_value=10))
def test_it_keeps_no_more_than_the_window(records: list[bool], window: int) -> None:
    """However long the partition, the gauge holds one number for each poison record of the window."""
    gauge = PoisonGauge(PoisonPolicy(max_ratio=1.0, ratio_window=window))

    for seen, poison in enumerate(records, 1):
        assert gauge.add(poison=poison) is None
        assert len(gauge._poisoned) == sum(records[max(0, seen - window) : seen])


def test_no_limit_needs_no_gauge() -> None:
    """The default of contract 6: nothing is counted."""
    assert PoisonPolicy().gauge() is None
    assert PoisonPolicy(max_consecutive=1).gauge() is not None
    assert PoisonPolicy(max_ratio=0.0).gauge() is not None


def test_it_says_which_rule_it_was() -> None:
    """The reason is for people: rule and numbers."""
    run, ratio = PoisonGauge(PoisonPolicy(max_consecutive=2)), PoisonGauge(PoisonPolicy(max_ratio=0.5, ratio_window=4))

    assert [run.add(poison=True) for _ in range(2)] == [None, "2 poison records in a row"]
    assert [ratio.add(poison=poison) for poison in (True, False, True, True)] == [
        *[None] * 3,
        "3 of the last 4 records are poison",
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PoisonPolicy(max_consecutive=0),
        lambda: PoisonPolicy(max_ratio=-0.1),
        lambda: PoisonPolicy(max_ratio=1.1),
        lambda: PoisonPolicy(max_ratio=float("nan")),
        lambda: PoisonPolicy(ratio_window=0),
    ],
)
def test_impossible_limits_are_refused(make: object) -> None:
    """A policy is possible or it does not exist."""
    assert callable(make)
    with pytest.raises(ValueError, match="not"):
        make()
