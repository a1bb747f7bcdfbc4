"""Waits between attempts grow, are bounded, and never fall into step."""

from __future__ import annotations

import pytest

from consumer.retry import RetryPolicy


def test_the_defaults_are_those_of_the_configuration() -> None:
    """Contract 6, ``retry``."""
    policy = RetryPolicy()

    assert (policy.attempts, policy.initial_seconds, policy.max_seconds, policy.exhausted) == (3, 0.1, 5.0, "block")
    assert policy.attempt_timeout_seconds == 20.0


def test_the_longest_wait_doubles_up_to_its_maximum() -> None:
    """Attempts go on for ever where they block: no wait overflows, however many there were."""
    policy = RetryPolicy(initial_seconds=0.1, max_seconds=5.0)

    longest = [policy.backoff(failed, 1.0) for failed in (1, 2, 3, 6, 7, 100, 1_000_000)]

    assert longest == pytest.approx([0.1, 0.2, 0.4, 3.2, 5.0, 5.0, 5.0])


def test_a_wait_is_drawn_from_all_of_its_interval() -> None:
    """Full jitter: operations that failed together do not come back together."""
    policy = RetryPolicy(initial_seconds=1.0, max_seconds=10.0)

    assert [policy.backoff(2, jitter) for jitter in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 2.0]


def test_no_wait_at_all_is_a_policy_too() -> None:
    """A maximum of zero, as tests of the whole service use it."""
    assert RetryPolicy(initial_seconds=0, max_seconds=0).backoff(5, 1.0) == 0.0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"attempts": 0}, "at least 1 attempt"),
        ({"initial_seconds": -0.1}, "initial <= max"),
        ({"initial_seconds": 2.0, "max_seconds": 1.0}, "initial <= max"),
        ({"attempt_timeout_seconds": 0.0}, "more than 0 seconds"),
        ({"attempt_timeout_seconds": float("nan")}, "more than 0 seconds"),
    ],
)
def test_what_cannot_be_followed_is_refused(settings: dict[str, float], text: str) -> None:
    """At construction, where the mistake is."""
    with pytest.raises(ValueError, match=text):
        RetryPolicy(**settings)  # type: ignore[arg-type]  # one setting each
