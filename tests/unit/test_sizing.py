"""`tierstream size`: the arithmetic holds for any load, and what it prints is a configuration that says so."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from cli_runner import Tierstream
from consumer import assignment, sizing
from consumer.config import Config
from consumer.config import load as load_config
from consumer.permits import plan_windows
from consumer.sizing import BASE_BYTES, Load, mean_latency, plan, smallest_limit, window_for


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """Any load that a service of this size may have."""
    p50 = draw(st.floats(1e-4, 5))
    return Load(
        rate=draw(st.floats(0.01, 50_000)),
        p50=p50,
        p99=draw(st.none() | st.floats(p50, p50 * 20)),
        partitions=draw(st.integers(1, 200)),
        processes=draw(st.integers(1, 50)),
        payload_bytes=draw(st.integers(0, 1024 * 1024)),
        headroom=draw(st.floats(1, 5)),
        policy=draw(st.sampled_from(["equal-share", "share-of-available"])),
        fraction=draw(st.fractions(Fraction(1, 100), Fraction(1, 2), max_denominator=100)),
    )


class TestPlan:
    """The pure part."""

    @given(loads())
    def test_what_is_planned_carries_the_load(self, load: Load) -> None:
        """Little's law, read backwards: the windows that the partitions really get do at least the rate asked for."""
        try:
            planned = plan(load)
        except ValueError:
            assume(False)

        assert planned.rate_max >= load.rate * load.headroom * (1 - 1e-6)
        assert min(planned.windows) >= planned.window
        assert sum(planned.windows) <= planned.limit
        assert min(planned.windows_after_loss, default=1) >= 1, "one that has lost its window stands still"
        assert planned.in_flight == pytest.approx(load.rate * planned.mean_seconds)
        assert planned.members * planned.partitions_each >= load.partitions
        assert len(planned.windows) == planned.partitions_each

    @given(loads())
    def test_the_windows_are_those_the_service_would_reserve(self, load: Load) -> None:
        """Nothing is computed twice: it is the service's own plan of windows, for that limit and policy."""
        try:
            planned = plan(load)
        except ValueError:
            assume(False)
        reserved = plan_windows(
            [("operations", number) for number in range(planned.partitions_each)],
            limit=planned.limit,
            available=planned.limit,
            fraction=load.fraction,
            policy=load.policy,
        )

        assert sorted(reserved.windows.values(), reverse=True) == list(planned.windows)
        assert not reserved.divided_equally

    @given(st.integers(1, 50), st.integers(1, 30), st.fractions(Fraction(1, 50), Fraction(1, 2), max_denominator=50))
    def test_the_limit_is_the_smallest_that_does(self, window: int, partitions: int, fraction: Fraction) -> None:
        """One permit less, and the last partition has less than it needs."""
        try:
            limit = smallest_limit(window, partitions, "share-of-available", fraction)
        except ValueError:
            assume(False)
        names = [("", number) for number in range(partitions)]

        less = plan_windows(names, limit=limit - 1, available=limit - 1, fraction=fraction, exhausted="pause")

        assert min(less.windows.values()) < window
        assert smallest_limit(window, partitions, "equal-share", fraction) == window * partitions

    @given(loads(), st.floats(1, 10))
    def test_more_of_anything_never_needs_less(self, load: Load, times: float) -> None:
        """Rate, latency and headroom; and the memory is never below what the budget allows."""
        from dataclasses import replace

        try:
            planned = plan(load)
            more = [
                plan(replace(load, rate=load.rate * times)),
                plan(replace(load, headroom=load.headroom * times)),
                plan(replace(load, p50=load.p50 * times, p99=None if load.p99 is None else load.p99 * times)),
            ]
        except ValueError:
            assume(False)

        assert all(one.window >= planned.window for one in more)
        assert all(one.process_bytes >= planned.process_bytes for one in more[:2])
        assert planned.process_bytes >= BASE_BYTES + planned.in_flight_bytes
        assert planned.in_flight_bytes >= 2 * planned.limit * load.payload_bytes

    def test_what_it_counts_with_is_what_the_service_has(self) -> None:
        """Said again here, so that a calculation loads nothing of the service."""
        assert assignment.RECORD_OVERHEAD_BYTES == sizing.RECORD_OVERHEAD_BYTES
        assert Config().limits.in_flight_bytes == sizing.IN_FLIGHT_BYTES_DEFAULT

    def test_the_mean_lies_between_the_percentiles_and_is_that_of_a_log_normal_distribution(self) -> None:
        """Against a million values drawn from one."""
        import random

        drawn = random.Random(1)
        sigma = math.log(120 / 20) / 2.326
        values = [drawn.lognormvariate(math.log(0.020), sigma) for _ in range(200_000)]

        assert mean_latency(0.020, 0.120) == pytest.approx(sum(values) / len(values), rel=0.02)
        assert mean_latency(0.020, None) == 0.020

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"rate": 1e308}, "1,000,000 permits in a process; more partitions"),
            ({"headroom": 1e308, "rate": 1e3}, "1,000,000 permits in a process; more partitions"),
            ({"partitions": 1_500_000, "processes": 2}, "1,000,000 permits in a process; more processes"),
            ({"payload_bytes": 2**40}, "1 TiB of memory"),
        ],
    )
    def test_what_nobody_can_have_meant_is_refused(self, changes: dict[str, Any], said: str) -> None:
        usual: dict[str, Any] = {
            "rate": 1, "p50": 100.0, "p99": None, "partitions": 1, "processes": 1, "payload_bytes": 1
        }  # fmt: skip
        with pytest.raises(ValueError, match=said):
            plan(Load(**(usual | changes)))

    def test_no_partition_is_without_a_permit_when_a_process_has_gone(self) -> None:
        """A load so small that one permit is enough for a partition: the other process then has two of them."""
        planned = plan(Load(5, 0.020, None, 10, 10, 4096))

        assert (planned.window, planned.partitions_each, planned.limit) == (1, 1, 2)
        assert planned.windows_after_loss == (1, 1)

    def test_a_known_example(self) -> None:
        """10,000 a second at 20 ms, 12 partitions: 200 at a time (docs/sizing)."""
        planned = plan(Load(10_000, 0.020, None, 12, 1, 4096, headroom=1.0))

        assert planned.in_flight == pytest.approx(200)
        assert planned.window == window_for(200 / 12, 1.0) == 27
        assert planned.limit == 12 * 27

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"rate": 0}, "rate is above 0"),
            ({"p99": 0.001}, "p99 is not below p50"),
            ({"p99": 20_001.0}, "p99 is at most 1,000,000 times p50"),
            ({"partitions": 0}, "partitions is above 0"),
            ({"processes": -1}, "processes is above 0"),
            ({"headroom": 0.5}, "headroom is at least 1"),
            ({"payload_bytes": -1}, "payload is not negative"),
            ({"rate": math.inf}, "rate is above 0"),
        ],
    )
    def test_what_cannot_be_is_refused_in_words(self, changes: dict[str, Any], said: str) -> None:
        usual: dict[str, Any] = {
            "rate": 1, "p50": 0.02, "p99": None, "partitions": 1, "processes": 1, "payload_bytes": 1
        }  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Load(**(usual | changes))


class TestCommand:
    """What it prints."""

    LOAD = ("size", "--rate", "10000", "--p50", "20ms", "--p99", "120ms", "--partitions", "12", "--processes", "3")

    @pytest.fixture
    def tierstream(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
    ) -> Tierstream:
        """The command."""
        return Tierstream(monkeypatch, capfd, tmp_path)

    @pytest.mark.parametrize("more", [[], ["--policy", "share-of-available", "--fraction", "0.2", "--payload", "2MiB"]])
    def test_stdout_is_a_configuration_that_the_service_takes(self, tierstream: Tierstream, more: list[str]) -> None:
        said = tierstream(*self.LOAD, *more)
        (tierstream.folder / "sized.yaml").write_text(said.out, encoding="utf-8")
        read = load_config(tierstream.folder / "sized.yaml")
        told = tierstream(*self.LOAD, *more, "--json").json

        assert said.code == 0
        assert read.concurrency.limit == told["plan"]["limit"]
        assert read.window.policy == told["config"]["window"]["policy"] == yaml.safe_load(said.out)["window"]["policy"]
        assert read.limits.in_flight_bytes == told["config"]["limits"]["in_flight_bytes"]
        if more:
            assert read.window.fraction == Fraction(1, 5)

    def test_the_arithmetic_is_shown_within_80_columns(self, tierstream: Tierstream) -> None:
        said = tierstream(*self.LOAD)

        assert "10,000/s x 26.91 ms = 269.1 at a time (Little's law)" in said.err
        assert "22.42 x 2 headroom = 45 permits" in said.err
        assert "4 x 45 = 180, divided equally" in said.err
        assert "one gone     windows of 30: 13,379 a second, enough" in said.err
        assert max(map(len, said.err.splitlines())) <= 80

    def test_a_permit_more_than_the_windows_need_is_explained(self, tierstream: Tierstream) -> None:
        said = tierstream("size", "--rate", "5", "--p50", "20ms", "--partitions", "10", "--processes", "10")

        assert "1 x 1 = 1, divided equally\n             at least 2: one for each partition" in said.err
        assert "limit: 2" in said.out
        assert "one gone     windows of 1: 500 a second, enough" in said.err

    @pytest.mark.parametrize("fraction", ["0.1", "0.123456789"])
    def test_the_fraction_is_the_one_that_was_given(self, tierstream: Tierstream, fraction: str) -> None:
        said = tierstream(*self.LOAD, "--policy", "share-of-available", "--fraction", fraction)
        (tierstream.folder / "sized.yaml").write_text(said.out, encoding="utf-8")

        assert load_config(tierstream.folder / "sized.yaml").window.fraction == Fraction(fraction)

    def test_what_is_not_enough_is_said(self, tierstream: Tierstream) -> None:
        said = tierstream(
            "size", "--rate", "90000", "--p50", "2ms", "--partitions", "3", "--processes", "5", "--headroom", "1"
        )

        assert "1.8 cores or more" in said.err
        assert "idle         2 processes: a partition has one" in said.err
        crowded = tierstream("size", "--rate", "90000", "--p50", "2ms", "--partitions", "1")
        assert "NOT ENOUGH: 2 processes or more" in crowded.err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--p50", "20"], "error: --p50 is a duration"),
            (["--payload", "big"], "error: --payload is a size"),
            (["--p99", "1ms"], "error: p99 is not below p50"),
            (["--fraction", "2"], "error: --fraction a window fraction is above 0"),
            (["--rate", "9e9", "--p99", "1m"], "error: that needs more than 1,000,000 permits"),
            (["--rate", "1e308", "--p50", "60s", "--p99", "2m"], "error: that needs more than 1,000,000 permits"),
            (["--p99", "9" * 300 + "d"], "error: p99 is at most 1,000,000 times p50"),
        ],
    )
    def test_a_wrong_number_is_usage(self, tierstream: Tierstream, arguments: list[str], said: str) -> None:
        result = tierstream(*self.LOAD, *arguments)

        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(said)
