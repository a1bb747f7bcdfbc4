"""Each error says what it is, who has to care, and whether to try again."""

from __future__ import annotations

import logging

import pytest

from consumer import errors
from consumer.errors import (
    DEAD_LETTER_CODES,
    POISON_CODES,
    STATUS_BY_CODE,
    AtCapacity,
    BackendError,
    BackendUnavailable,
    ConfigError,
    DecodeError,
    InvalidMetadata,
    InvalidOperation,
    OperationDropped,
    OperationPanic,
    OperationTimeout,
    ReferenceFailure,
    TierstreamError,
    TooLarge,
    UnexpectedTombstone,
    UsecaseDenied,
)

TABLE = [
    # class, code, status, retriable, who has to care
    (AtCapacity, "at_capacity", 503, True, logging.WARNING),
    (OperationPanic, "panic", 500, False, logging.ERROR),
    (OperationDropped, "dropped", 500, True, logging.ERROR),
    (OperationTimeout, "timeout", 504, True, logging.ERROR),
    (DecodeError, "decode_error", 400, False, logging.DEBUG),
    (InvalidOperation, "invalid_operation", 400, False, logging.DEBUG),
    (InvalidMetadata, "invalid_metadata", 400, False, logging.DEBUG),
    (UsecaseDenied, "usecase_denied", 403, False, logging.DEBUG),
    (ReferenceFailure, "reference_unreadable", 404, False, logging.DEBUG),
    (TooLarge, "payload_too_large", 413, False, logging.DEBUG),
    (BackendError, "backend_error", 502, False, logging.ERROR),
    (BackendUnavailable, "backend_unavailable", 503, True, logging.ERROR),
    (UnexpectedTombstone, "unexpected_tombstone", 500, False, logging.ERROR),
    (ConfigError, "config_error", 500, False, logging.ERROR),
]


@pytest.mark.parametrize(("kind", "code", "status", "retriable", "log_level"), TABLE)
def test_an_error_says_what_it_is(
    kind: type[TierstreamError], code: str, status: int, *, retriable: bool, log_level: int
) -> None:
    """ERR-1, ERR-2, contract 2.2 and 10: code, status, retriable, log level; the message is the first argument."""
    error = kind("in plain words")

    assert (error.code, error.status, error.retriable, error.log_level) == (code, status, retriable, log_level)
    assert str(error) == "in plain words"
    assert isinstance(error, TierstreamError)


def test_every_error_is_in_the_table_above() -> None:
    """So that a new one is a decision about its code, its level and its retries."""
    ours = {
        thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, TierstreamError)
    }

    assert ours - {TierstreamError} == {row[0] for row in TABLE}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DecodeError("", code="unknown_schema"), 400),
        (DecodeError("", code="unsafe_schema"), 400),
        (DecodeError("", code="null_value"), 400),
        (ReferenceFailure("", code="reference_denied"), 403),
        (ReferenceFailure("", code="reference_mismatch"), 409),
        (TooLarge("", code="response_too_large"), 413),
    ],
)
def test_an_error_has_the_code_it_is_given(error: TierstreamError, status: int) -> None:
    """Contract 2.2: some classes stand for several codes; giving one leaves the class as it was."""
    assert error.status == status
    assert type(error)().code != error.code


def test_every_code_has_a_status() -> None:
    """A response needs one."""
    assert set(STATUS_BY_CODE) >= {row[1] for row in TABLE} | DEAD_LETTER_CODES


def test_poison_is_what_never_became_an_operation() -> None:
    """Contract 2.2: poison, panics and permanent faults of storage are dead-lettered."""
    assert all(STATUS_BY_CODE[code] == 400 for code in POISON_CODES)
    assert {"panic", "backend_error"} == DEAD_LETTER_CODES - POISON_CODES


def test_a_clients_fault_is_told_from_storages() -> None:
    """ERR-3: by class, by code and by the level it is logged at."""
    client, storage = ReferenceFailure("cut off"), BackendUnavailable("away")

    assert client.code != storage.code
    assert (client.retriable, storage.retriable) == (False, True)
    assert client.log_level < storage.log_level


def test_a_panic_is_named_after_its_cause() -> None:
    """EXE-12: type and text, without a trace; the cause is kept for those who look."""
    cause = ValueError("no such thing")

    panic = OperationPanic.from_exception(cause)

    assert str(panic) == "ValueError: no such thing"
    assert panic.__cause__ is cause
    assert str(OperationPanic.from_exception(KeyError())) == "KeyError"
