"""What a coordinator says of the last transaction of a ``transactional.id``: whether, and how, it was decided.

The decision is the coordinator's alone, whatever has become of the transaction's markers. aiokafka has no request for
it, so the one that there is is written down here, for that purpose alone.

Source: KIP-664; ``DescribeTransactionsRequest.json`` and ``DescribeTransactionsResponse.json`` of Apache Kafka, version
0 (brokers from 3.0). Asking needs Describe on the id, which Write includes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from aiokafka.errors import NoError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields

TRANSACTIONAL_ID_NOT_FOUND: Final = 105
"""An error that aiokafka does not know by name."""

_COMMIT: Final = frozenset({"PrepareCommit", "CompleteCommit"})
_ABORT: Final = frozenset({"PrepareAbort", "CompleteAbort", "PrepareEpochFence"})
_MARKING: Final = frozenset({"PrepareCommit", "PrepareAbort"})
_UNDER_WAY: Final = _MARKING | {"Ongoing", "PrepareEpochFence"}


@dataclass(frozen=True, slots=True)
class TransactionState:
    """The last transaction of a ``transactional.id``, as its coordinator names its state."""

    name: str
    """``Empty`` where there was none since a producer has last started, or ever."""

    @property
    def committed(self) -> bool | None:
        """How it was decided; None where it is not, or there is none."""
        return True if self.name in _COMMIT else False if self.name in _ABORT else None

    @property
    def complete(self) -> bool:
        """Whether its markers are written, as far as the coordinator is going to."""
        return self.name not in _UNDER_WAY

    @property
    def marking(self) -> bool:
        """Whether it is decided, and its markers are being written."""
        return self.name in _MARKING


class _DescribeTransactionsResponse(Response):
    API_KEY = 65
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "transaction_states",
            CompactArray(
                ("error_code", Int16),
                ("transactional_id", CompactString("utf-8")),
                ("transaction_state", CompactString("utf-8")),
                ("transaction_timeout_ms", Int32),
                ("transaction_start_time_ms", Int64),
                ("producer_id", Int64),
                ("producer_epoch", Int16),
                (
                    "topics",
                    CompactArray(
                        ("topic", CompactString("utf-8")), ("partitions", CompactArray(Int32)), ("tags", TaggedFields)
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _DescribeTransactionsRequest(RequestStruct):
    FLEXIBLE_VERSION = True
    API_KEY = 65
    API_VERSION = 0
    RESPONSE_TYPE = _DescribeTransactionsResponse
    SCHEMA = Schema(("transactional_ids", CompactArray(CompactString("utf-8"))), ("tags", TaggedFields))


class TransactionStateRequest(Request[_DescribeTransactionsRequest]):
    """Asks the coordinator of a transactional id for its last transaction.

    Preparing it for a broker that does not speak it raises ``IncompatibleBrokerVersion``.
    """

    API_KEY = 65

    def __init__(self, transactional_id: str) -> None:
        self._transactional_id = transactional_id

    def build(self, request_struct_class: type[_DescribeTransactionsRequest]) -> _DescribeTransactionsRequest:
        """Make what is sent."""
        return request_struct_class([self._transactional_id], {})


def described(answer: Any) -> tuple[int, TransactionState]:
    """Return the error in an answer, 0 for none, and the state; an id that nobody has used yet is no error."""
    (found,) = answer.to_object()["transaction_states"]
    if found["error_code"] == TRANSACTIONAL_ID_NOT_FOUND:
        return NoError.errno, TransactionState("Empty")
    return found["error_code"], TransactionState(found["transaction_state"])
