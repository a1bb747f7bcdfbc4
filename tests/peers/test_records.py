"""What is compared with the peers is tierstream's own work: records and responses that its codec knows."""

from __future__ import annotations

import json

import bench
import candidate
import pytest
import records

from consumer.codec import OperationDecoder, ResponseEncoder
from consumer.config import load
from consumer.ids import ObjectId
from consumer.operations import Insert, Inserted


class Response:
    """A response as the runner's client gives it."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def value(self) -> bytes:
        """The record's value."""
        return self._value


@pytest.mark.parametrize("number", [0, 7, 63, 64, 8191, 8192, 249_999])
def test_a_record_of_the_workload_is_an_insert_of_its_size_and_its_response_tells_its_number(number: int) -> None:
    """Else the table would compare something else, or count answers as missing."""
    key, value = records.make(number)

    decoded = OperationDecoder().decode(value, ())
    operation = decoded.operation

    assert isinstance(operation, Insert)
    assert len(value) == records.VALUE_BYTES
    assert key.decode() == operation.key == f"{number % records.KEYS:04}"
    assert operation.key is not None
    answer = Inserted(ObjectId(operation.context, operation.key), operation.metadata)
    _, response = ResponseEncoder("in-0123456789", 7).encode(number * 3, decoded, answer, 1)
    assert records.id_of(Response(response)) == number


@pytest.mark.parametrize("name", bench.CANDIDATES)
def test_a_candidate_is_a_configuration_of_the_service(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With everything the service does; what differs between candidates stands in their list."""
    given = {"BOOTSTRAP": "127.0.0.1:1", "GROUP": "g", "INPUT": "i", "OUTPUT": "o"}
    given |= {"LATENCY_MS": "5", "CONCURRENCY": "500"}
    file = tmp_path_factory.mktemp("candidate") / "c.json"
    file.write_text(json.dumps(candidate.settings(given, bench.CANDIDATES[name][1:])), encoding="utf-8")

    config = load(file)

    assert config.window.policy == "equal-share"
    assert getattr(config.storage.high_volume, "latency", None) == 0.005
