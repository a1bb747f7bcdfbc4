"""An object's address: what it is made of, what it may not be, and that its path reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.errors import InvalidOperation
from consumer.ids import SCOPES_MAX, STORAGE_PATH_BYTES_MAX, ObjectContext, ObjectId, Scope

SCOPE_CHARACTERS = "abcXYZ019_-()$!+'"
USECASES = st.text("abcXYZ019_-", min_size=1, max_size=20)
SCOPES = st.lists(
    st.builds(Scope, st.text(SCOPE_CHARACTERS, min_size=1, max_size=9), st.text(SCOPE_CHARACTERS, min_size=1)),
    max_size=4,
)
KEYS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30)


def test_a_path_is_usecase_scopes_objects_key() -> None:
    """ID-2: scopes in the order given."""
    context = ObjectContext("attachments", [Scope("org", "17"), Scope("project", "4")])

    assert ObjectId(context, "a/b.txt").storage_path == "attachments/org.17/project.4/objects/a/b.txt"


def test_without_scopes_a_path_is_usecase_objects_key() -> None:
    """ID-3."""
    assert ObjectId(ObjectContext("u"), "k").storage_path == "u/objects/k"


def test_the_order_of_scopes_is_part_of_identity() -> None:
    """ID-1."""
    one, two = Scope("org", "1"), Scope("project", "2")

    assert ObjectContext("u", [one, two]) != ObjectContext("u", [two, one])
    assert ObjectContext("u", [one, two]) == ObjectContext("u", (one, two))
    assert len({ObjectId(ObjectContext("u", order), "k") for order in ([one, two], [two, one], [one, two])}) == 2


@given(USECASES, SCOPES, KEYS)
def test_a_path_reads_back(usecase: str, scopes: list[Scope], key: str) -> None:
    """ID-4: whatever the key holds, slashes and ``objects`` included; different objects have different paths."""
    try:
        object_id = ObjectId(ObjectContext(usecase, scopes), key)
    except InvalidOperation:
        assert len(f"{ObjectContext(usecase, scopes).storage_prefix}{key}".encode()) > STORAGE_PATH_BYTES_MAX
        return

    assert ObjectId.parse(object_id.storage_path) == object_id
    assert str(object_id) == object_id.storage_path


@pytest.mark.parametrize("key", ["a/b/c", "/", "objects/x", "x/objects/y", "..", "./a", "ключ", "a\u200db", "\u202ea"])
def test_a_key_may_look_like_anything(key: str) -> None:
    """ID-4, contract 10: slashes, dots, joiners and direction marks are allowed."""
    object_id = ObjectId(ObjectContext("u", [Scope("org", "1")]), key)

    assert ObjectId.parse(object_id.storage_path) == object_id


@pytest.mark.parametrize(
    "path",
    [
        "",
        "u",
        "u/",
        "u/objects",
        "u/k",
        "u/org.1/k",
        "/objects/k",
        "u/objects/",
        "u/org/objects/k",
        "u/.1/objects/k",
        "u/org./objects/k",
        "u/o rg.1/objects/k",
        "u/org.1.2/objects/k",
        "u//objects/k",
        "usé/objects/k",
        "u/objects/a\x00b",
    ],
)
def test_what_is_no_path_is_refused(path: str) -> None:
    """ID-5, contract 10: no ``objects``, nothing where something must be, a scope without a dot, a part that is bad."""
    with pytest.raises(InvalidOperation):
        ObjectId.parse(path)


@pytest.mark.parametrize("text", [*SCOPE_CHARACTERS, "x" * 256])
def test_scope_names_and_values_are_made_of_this(text: str) -> None:
    """ID-6."""
    assert Scope(text, text).name == text


@pytest.mark.parametrize("text", ["", ".", "a.b", "/", "=", ";", " ", "é", "a\n", "\x00", "x" * 257, "\ud800"])
def test_scope_names_and_values_are_made_of_nothing_else(text: str) -> None:
    """ID-6: dot, slash, equals and semicolon have a meaning of their own."""
    with pytest.raises(InvalidOperation):
        Scope(text, "value")
    with pytest.raises(InvalidOperation):
        Scope("name", text)


@pytest.mark.parametrize("usecase", ["a", "A-Z_09", "x" * 128])
def test_a_usecase_is_made_of_this(usecase: str) -> None:
    """Contract 2.1."""
    assert ObjectContext(usecase).usecase == usecase


@pytest.mark.parametrize("usecase", ["", "x" * 129, "a.b", "a/b", "a b", "é", "a\n"])
def test_a_usecase_is_made_of_nothing_else(usecase: str) -> None:
    """Contract 2.1."""
    with pytest.raises(InvalidOperation):
        ObjectContext(usecase)


def test_a_context_has_at_most_32_scopes() -> None:
    """Contract 2.1."""
    scopes = [Scope("n", str(number)) for number in range(SCOPES_MAX + 1)]

    assert len(ObjectContext("u", scopes[:SCOPES_MAX]).scopes) == 32
    with pytest.raises(InvalidOperation, match="32 scopes"):
        ObjectContext("u", scopes)


def test_scopes_have_a_public_form() -> None:
    """ID-7: for logs and people; the path is for machines."""
    assert str(ObjectContext("u", [Scope("org", "17"), Scope("project", "4")])) == "u/org=17;project=4"
    assert str(ObjectContext("u")) == "u/_"


@pytest.mark.parametrize("key", ["", "a\nb", "\x00", "\x7f", "\x85", "\ud800", "a\udfff", "é\x1f"])
def test_a_key_has_neither_control_characters_nor_lone_surrogates(key: str) -> None:
    """Contract 2.1 and 10: category Cc; nothing that is no Unicode; and something at all."""
    with pytest.raises(InvalidOperation):
        ObjectId(ObjectContext("u"), key)


@pytest.mark.parametrize("character", ["x", "é", "😀"])
def test_a_path_has_at_most_900_bytes(character: str) -> None:
    """Contract 2.1: bytes of UTF-8, whatever they say."""
    room = STORAGE_PATH_BYTES_MAX - len("u/objects/")
    fitting = character * (room // len(character.encode()))
    fitting += "x" * (room - len(fitting.encode()))

    assert len(ObjectId(ObjectContext("u"), fitting).storage_path.encode()) == 900
    with pytest.raises(InvalidOperation, match="900 bytes"):
        ObjectId(ObjectContext("u"), fitting + "x")


def test_what_is_no_text_is_no_identity() -> None:
    """A caller's mistake in Python is told as one, and not as a defect of this service."""
    context = ObjectContext("u")
    for mistake in (
        lambda: ObjectId(context, 5),  # type: ignore[arg-type]
        lambda: ObjectId(context, b"key"),  # type: ignore[arg-type]
        lambda: ObjectContext(None),  # type: ignore[arg-type]
        lambda: ObjectContext("u", [("org", "1")]),  # type: ignore[list-item]
        lambda: Scope("org", 17),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidOperation):
            mistake()
