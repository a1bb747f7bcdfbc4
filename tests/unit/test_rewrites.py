"""The judges of objects that are rewritten through kills see each of the three ways in which a later write can lose."""

from __future__ import annotations

from typing import Any

from ledger import Answer, Entry
from rewrites import ahead, overtaken, stale

FIRST, SECOND, OTHER = (Entry("in", 0, offset, None, None, []) for offset in (4, 7, 8))
"""Two operations on one object, and one on another."""


class Read(Answer):
    """The response to a read, decoded."""

    def __init__(self, payload: bytes | None) -> None:
        super().__init__(0, 0, None, None, [], 0)
        got: dict[str, Any] = {"status": 404, "result": ["Failure", {"code": "NOT_FOUND"}]}
        if payload is not None:
            got = {"status": 200, "result": ["Got", {"object": {"payload": payload}}]}
        self.__dict__["response"] = got


def at(*offsets: int) -> list[Answer]:
    """Responses in these places of the output."""
    return [Answer(0, offset, None, None, [], 0) for offset in offsets]


def test_an_object_has_to_hold_what_was_written_last() -> None:
    """And nothing where that was a deletion."""
    reads = {(0, "a"): [FIRST]}

    def told(payload: bytes | None, last: bytes | None) -> list[str]:
        return list(stale({FIRST.id: [Read(payload)]}, reads, {(0, "a"): last}))

    assert told(b"new", b"new") == told(None, None) == []
    for payload, last in ((b"old", b"new"), (None, b"new"), (b"old", None)):
        assert told(payload, last) != [], (payload, last)


def test_first_responses_to_one_object_have_to_stand_in_the_order_of_its_operations() -> None:
    """What comes again after a kill may stand anywhere."""
    assert list(overtaken({FIRST.id: at(1, 9), SECOND.id: at(2)}, [[FIRST, SECOND], [OTHER]])) == []
    (wrong,) = overtaken({FIRST.id: at(3), SECOND.id: at(9, 2)}, [[FIRST, SECOND]])
    assert wrong == "the response to in/0/7 stands before that to in/0/4, on the same object"


def test_an_offset_map_may_hold_no_operation_without_those_before_it_on_the_same_object() -> None:
    """What is below the committed offset is finished, too; and another object's operations are none of them."""
    written = [[FIRST, SECOND], [OTHER]]
    for right in ({}, {0: (4, {8})}, {0: (4, {4, 7})}, {0: (4, {4})}, {0: (5, {7})}, {1: (0, {7})}):
        assert list(ahead(right, written)) == [], right
    (wrong,) = ahead({0: (4, {7})}, written)
    assert wrong == "an offset map holds in/0/7, and not in/0/4 before it on the same object"
