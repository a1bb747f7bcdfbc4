"""Revision names: made, read back, never the same twice."""

from __future__ import annotations

import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.errors import InvalidOperation
from consumer.ids import STORAGE_PATH_BYTES_MAX, ObjectContext, ObjectId, Scope
from consumer.storage.revision import new_revision, parse_revision, uuid7

OBJECT = ObjectId(ObjectContext("usecase", [Scope("org", "17")]), "a/key")


def test_a_revision_is_the_storage_path_and_a_uuid7() -> None:
    """TIER-1."""
    path, _, unique = new_revision(OBJECT).name.rpartition("/")

    assert path == OBJECT.storage_path
    assert uuid.UUID(unique).version == 7


def test_two_revisions_of_an_object_differ() -> None:
    """TIER-1."""
    assert len({new_revision(OBJECT) for _ in range(10_000)}) == 10_000


@given(st.text(min_size=1, max_size=200, alphabet=st.characters(exclude_categories=["Cc", "Cs"])))
def test_a_revision_reads_back(key: str) -> None:
    """TIER-1: whatever the key, slashes and UUIDs included."""
    object_id = ObjectId(ObjectContext("u", [Scope("a", "b")]), key)
    revision = new_revision(object_id)

    assert parse_revision(revision.name)[0] == object_id


def test_a_revision_of_a_revision_like_key_reads_back() -> None:
    """A key may look like a revision itself."""
    object_id = ObjectId(OBJECT.context, f"key/{uuid7()}")

    assert parse_revision(new_revision(object_id).name)[0] == object_id


def test_the_longest_path_still_makes_a_legal_object_name() -> None:
    """Contract 5: at most 1,024 bytes, as GCS allows."""
    prefix = len(OBJECT.context.storage_prefix)
    revision = new_revision(ObjectId(OBJECT.context, "k" * (STORAGE_PATH_BYTES_MAX - prefix)))

    assert len(revision.name.encode()) == 937


@pytest.mark.parametrize(
    "name",
    [
        "usecase/objects/key",
        "usecase/objects/key/",
        f"usecase/objects/key/{uuid.UUID(int=0)}",
        f"usecase/objects/key/{uuid.uuid4()}",
        f"usecase/objects/key/{uuid7().hex}",
        f"usecase/objects/key/{str(uuid7()).upper().replace('7', 'A', 1)}",
        f"usecase/key/{uuid7()}",
        str(uuid7()),
        "",
    ],
)
def test_what_is_no_revision_name_is_refused(name: str) -> None:
    """Only names that were made here are read."""
    with pytest.raises(InvalidOperation):
        parse_revision(name)


def test_a_uuid7_carries_the_time_in_milliseconds() -> None:
    """RFC 9562, 5.7: ids of different milliseconds sort by time."""
    before = time.time_ns() // 1_000_000
    made = uuid7()
    after = time.time_ns() // 1_000_000

    assert before <= made.int >> 80 <= after
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
