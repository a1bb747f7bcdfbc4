"""A sample counts for the stage that a record is in; the table that says so names what is there."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import FrameType
from typing import Any

import pytest

from consumer import profiling
from consumer.codec import OperationDecoder, ResponseEncoder, encode_operation
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import DEFAULT_METADATA, Insert, Inserted
from consumer.profiling import STAGES, Sampler, stage_of
from consumer.storage.memory import MemoryBackend


@pytest.mark.parametrize("place", profiling._DECIDES)
def test_what_decides_a_stage_is_there(place: str) -> None:
    """A function that was renamed would count for whoever calls it, and nobody would see it."""
    module, _, function = place.partition(":")
    found = import_module(module)

    assert profiling._DECIDES[place] in STAGES
    assert not function or any(name.startswith(function) for name in _qualified_names(found)), place


def _qualified_names(module: Any) -> Iterator[str]:
    for _, thing in inspect.getmembers(module, lambda one: getattr(one, "__module__", "") == module.__name__):
        if inspect.isclass(thing):
            yield thing.__qualname__
            for member in vars(thing).values():
                yield getattr(member.fget if isinstance(member, property) else member, "__qualname__", "")
        elif inspect.isfunction(thing):
            yield thing.__qualname__


@pytest.mark.parametrize(
    ("module", "function", "stage"),
    [
        ("consumer.codec", "OperationDecoder.decode", "decode"),
        ("consumer.codec", "ResponseEncoder._encode", "encode"),
        ("consumer.codec", "_number", None),
        ("consumer.storage.memory", "MemoryBackend.get", "storage"),
        ("consumer.storage", "", "storage"),
        ("consumer.assignment", "Assignment._run", "dispatch"),
        ("consumer.assignment", "Assignment.acknowledged", "track"),
        ("consumer.kafka.poller", "Poller._poll", "fetch"),
        ("consumer.kafka.poller", "Poller._commit_points", "commit"),
        ("consumer.metrics", "Distribution.observe", None),
        ("consumerist.storage", "x", None),
        ("aiokafka.producer.sender", "Sender._sender_routine", "produce"),
        ("json", "dumps", None),
    ],
)
def test_the_place_that_says_most_decides(module: str, function: str, stage: str | None) -> None:
    """A function goes before its module, a module before its package."""
    assert stage_of(module, function) == stage


class TestSampler:
    """What a frame counts for."""

    def test_a_helper_counts_for_who_calls_it(self) -> None:
        """The same helper writes and reads."""
        insert = Insert(ObjectContext("u"), "k", DEFAULT_METADATA, b"payload")
        value = encode_operation(insert)
        decoder, encoder = OperationDecoder(), ResponseEncoder("operations", 0)
        decoded = decoder.decode(value)
        inserted = Inserted(ObjectId(insert.context, "k"), DEFAULT_METADATA)

        assert _stages_while(lambda: decoder.decode(value)) == {"decode"}
        assert _stages_while(lambda: encoder.encode(0, decoded, inserted, 0)) == {"encode"}

    def test_what_a_coroutine_awaits_counts_for_itself(self) -> None:
        """Storage is not dispatch, though dispatch awaits it."""
        backend = MemoryBackend()

        def dispatch() -> None:
            with pytest.raises(StopIteration):
                backend.get_tiered(ObjectId(ObjectContext("u"), "k")).send(None)

        assert "storage" in _stages_while(dispatch)

    def test_what_nobody_decides_is_the_loops(self) -> None:
        """So that all stages together are everything."""
        sampler = Sampler()
        sampler.count(sys._getframe())
        sampler.count(None)

        assert sampler.samples == {"loop": 2}

    def test_bytes_that_are_moved_for_nobody_are_the_networks(self) -> None:
        """The client reads for whoever has asked; what it sends, somebody sends."""
        calling: dict[str, Any] = {"__name__": "aiokafka.producer.sender"}
        moving: dict[str, Any] = {"__name__": "aiokafka.conn", "frame": sys._getframe}
        exec("def move(): return frame()", moving)
        exec("def send(move): return move()", calling)
        sampler = Sampler()
        sampler.count(moving["move"]())
        sampler.count(calling["send"](moving["move"]))

        assert sampler.samples == {"network": 1, "produce": 1}


def _stages_while(work: Callable[[], object]) -> set[str]:
    """Return the stages of all functions called below *work*, and of those alone."""
    sampler = Sampler()

    def sample(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is not work.__code__ and "consumer" in frame.f_globals["__name__"]:
            sampler.count(frame)

    before = sys.getprofile()
    sys.setprofile(sample)
    try:
        work()
    finally:
        sys.setprofile(before)
    return set(sampler.samples)
