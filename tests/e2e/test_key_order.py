"""Keys that order, through kills: a few rounds of what `rewrites.py` does and judges; `make soak` plays many."""

from __future__ import annotations

import pytest

import rewrites
from brokers import Broker
from chaos_plan import Delivery
from load import PARTITIONS, PUMP_SECONDS
from second_try import void_unless
from stages import SetStage

ROUNDS = 3
"""Kills."""

SEED = 3


@pytest.mark.slow
@pytest.mark.timeout(120 + PUMP_SECONDS * (ROUNDS + 1))
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_what_was_written_last_stays_through_kills(apache: Broker, set_stage: SetStage, delivery: Delivery) -> None:
    """I7, contract 3, 4: insert A, insert B on one object never ends as A; no response leaves early.

    H22, H25: in transactions, a kill leaves one open, which the next owner ends before it reads where to begin.
    """
    stage = set_stage(apache, partitions=PARTITIONS, delivery=delivery, **rewrites.SETTINGS)

    findings = rewrites.play(stage, ROUNDS, SEED, delivery)

    print(findings.report())
    assert findings.wrong == []
    void_unless(findings.happened["kills with work left"] == ROUNDS, "the kills hit an idle service")
    void_unless(findings.happened["operations finished above a gap at a kill"] > 0, "no kill found work above a gap")
