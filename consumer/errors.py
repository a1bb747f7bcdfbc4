"""Every error tierstream raises on purpose, with what the caller may do about it.

Two attributes decide everything that happens after a failure, so that neither the retry loop nor the
logger keeps a list of its own:

``code``
    The stable, public name of the failure (``Failure.code`` of a response).
``retriable``
    True when the same call may succeed later without anyone changing anything.
``log_level``
    Who has to care: ``DEBUG`` for a client's fault, ``WARNING`` for capacity, ``ERROR`` for ours.

A lost race, a missing object and a tombstone found are *values*, never errors.
"""

from __future__ import annotations

import logging
from typing import ClassVar

STATUS_BY_CODE: dict[str, int] = {
    "decode_error": 400,
    "unknown_schema": 400,
    "unsafe_schema": 400,
    "null_value": 400,
    "invalid_operation": 400,
    "invalid_metadata": 400,
    "usecase_denied": 403,
    "reference_denied": 403,
    "reference_unreadable": 404,
    "reference_mismatch": 409,
    "payload_too_large": 413,
    "response_too_large": 413,
    "panic": 500,
    "dropped": 500,
    "unexpected_tombstone": 500,
    "backend_error": 502,
    "backend_unavailable": 503,
    "timeout": 504,
    "at_capacity": 503,
    "config_error": 500,
}
"""HTTP-like status of every failure code. ``at_capacity`` and ``config_error`` never reach a response."""

POISON_CODES = frozenset(
    {"decode_error", "unknown_schema", "unsafe_schema", "null_value", "invalid_operation", "invalid_metadata"}
)
"""Codes of records that never became an operation. A record over ``limits.record_bytes`` is poison too; its code,
``payload_too_large``, is shared with objects that are too large, so the decoder says which one it was."""

DEAD_LETTER_CODES = POISON_CODES | {"panic", "backend_error"}
"""Codes whose input record is also written to the dead letter topic."""


class TierstreamError(Exception):
    """Root of all errors; *message* is short, factual and safe to show: no path, no secret, no payload.

    Args:
        message: What happened.
        hint: What can be done about it; None = what its class says, which may be nothing.
        code: None = that of its class.
    """

    code: str = "backend_error"
    hint: str | None = None
    retriable: bool = False
    log_level: ClassVar[int] = logging.ERROR

    def __init__(self, message: str = "", hint: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint
        if code is not None:
            self.code = code

    @property
    def status(self) -> int:
        """HTTP-like status number of :attr:`code`."""
        return STATUS_BY_CODE[self.code]


class AtCapacity(TierstreamError):
    """No permits to be had now. The caller's input was not touched; try again later."""

    code = "at_capacity"
    retriable = True
    log_level = logging.WARNING


class OperationPanic(TierstreamError):
    """An unexpected exception inside one operation; the others are unaffected."""

    code = "panic"

    @classmethod
    def from_exception(cls, error: BaseException) -> OperationPanic:
        """Wrap *error*; the message is its type and text, without a trace (checklist EXE-12)."""
        text = str(error)
        panic = cls(f"{type(error).__name__}: {text}" if text else type(error).__name__)
        panic.__cause__ = error
        return panic


class OperationDropped(TierstreamError):
    """The operation ended without a result, because its work was cancelled. Its effect is unknown."""

    code = "dropped"
    retriable = True


class OperationTimeout(TierstreamError):
    """The last attempt ran into its time limit. The effect may have happened or may still happen."""

    code = "timeout"
    retriable = True


class DecodeError(TierstreamError):
    """The bytes are not one complete, safe datum of a known schema.

    ``code`` is one of ``decode_error``, ``unknown_schema``, ``unsafe_schema``, ``null_value``.
    """

    code = "decode_error"
    log_level = logging.DEBUG


class InvalidOperation(TierstreamError):
    """The operation breaks a rule that does not concern its metadata (contract 2.1)."""

    code = "invalid_operation"
    log_level = logging.DEBUG


class InvalidMetadata(TierstreamError):
    """The metadata of an insert breaks a rule (contract 2.1)."""

    code = "invalid_metadata"
    log_level = logging.DEBUG


class UsecaseDenied(TierstreamError):
    """A usecase policy forbids the operation."""

    code = "usecase_denied"
    log_level = logging.DEBUG


class ReferenceFailure(TierstreamError):
    """A claim check cannot be used: ``reference_denied``, ``reference_unreadable`` or ``reference_mismatch``."""

    code = "reference_unreadable"
    log_level = logging.DEBUG


class TooLarge(TierstreamError):
    """A record or object (``payload_too_large``) or a response (``response_too_large``) is over its limit."""

    code = "payload_too_large"
    log_level = logging.DEBUG


class BackendError(TierstreamError):
    """Storage answered with a permanent fault; trying again does not help."""

    code = "backend_error"


class BackendUnavailable(TierstreamError):
    """Storage cannot be reached, or answered with a passing fault. The effect is unknown."""

    code = "backend_unavailable"
    retriable = True


class UnexpectedTombstone(TierstreamError):
    """A plain read met a redirect tombstone where none may be (checklist HV-3)."""

    code = "unexpected_tombstone"


class ConfigError(TierstreamError):
    """The configuration cannot be used; the message lists every problem found, one a line."""

    code = "config_error"
