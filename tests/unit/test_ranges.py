"""Places in a topic, as people name them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from consumer.kafka.ranges import milliseconds, parse_position

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("earliest", "earliest"),
        ("latest", "latest"),
        ("0", 0),
        ("9223372036854775807", 2**63 - 1),
        ("2026-01-31T12:00:00Z", NOON),
        ("2026-01-31t12:00:00z", NOON),
        ("2026-01-31 12:00:00Z", NOON),
        ("2026-01-31T14:00:00+02:00", NOON),
        ("2026-01-31T08:30:00-03:30", NOON),
        ("2026-01-31T12:00:00.5Z", NOON + timedelta(milliseconds=500)),
        ("2026-01-31T12:00:00.123456789+00:00", NOON + timedelta(microseconds=123_456)),
    ],
)
def test_a_place_is_read(text: str, position: object) -> None:
    """Contract 7: earliest, latest, an offset or an RFC 3339 time."""
    found = parse_position(text)

    assert found == position
    assert type(found) is type(position)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "newest",
        "-1",
        "+1",
        "1.5",
        "9223372036854775808",
        "\N{ARABIC-INDIC DIGIT ONE}",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "2026-01-31T12:00Z",
        "20260131T120000Z",
        "2026-02-30T12:00:00Z",
        "2026-01-31T25:00:00Z",
        "2026-01-31T12:00:00Z ",
        "2026-01-31T12:00:00.Z",
    ],
)
def test_what_is_no_place_is_refused_in_words(text: str) -> None:
    """A time without a zone means something else on each machine."""
    with pytest.raises(ValueError, match=r"2026-01-31T12:00:00Z|no time"):
        parse_position(text)


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC), 1),
        (datetime(1970, 1, 1, 0, 0, 0, 1000, tzinfo=UTC), 1),
        (datetime(1970, 1, 1, 2, tzinfo=timezone(timedelta(hours=1))), 3_600_000),
        (datetime(1960, 1, 1, tzinfo=UTC), 0),
    ],
)
def test_a_time_between_two_milliseconds_is_the_later_one(moment: datetime, expected: int) -> None:
    """Else a record before it would count as of that time; -1 and -2 mean something else to brokers."""
    assert milliseconds(moment) == expected
