"""A load whose every response can be judged, and what a test may hold against it at any moment.

Each object is inserted once, read twice and, every fourth one, deleted, always in one partition, so that key ordering
leaves one right answer to each operation, also after a replay (of a deleted object two: a replayed read may find it
gone). One object in eight is a few times larger than the others, for stages with a low threshold between the tiers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from ledger import Ledger
from stages import Stage

PUMP_SECONDS = 40
"""A restart after SIGKILL waits for the dead member's session to end, 6 s, and longer where machines are busy."""

PARTITIONS = 4

BACKLOG_MAX = 4_000
"""Records put in and not answered, while a pump waits: half a second's work with files, ten with emulators. All
that is more would have to be waited for at the end, the longer the slower a member comes."""

CANARY = "canary-3f9c2a"
"""Stands in every object key, record key and payload of a load, and never in anything the service says (I13)."""


class Load:
    """Records without end, in the same order in every run; `pump` puts some in and reads what comes out."""

    def __init__(self, ledger: Ledger, batch: int = 160, *, poison_every: int = 0) -> None:
        """Prepare a load for all partitions.

        *batch* is how many records a pump puts in; with *poison_every* one that cannot be decoded follows after so many
        objects.
        """
        self.ledger = ledger
        self.batch = batch
        self.sent = 0
        """Records handed to the producer."""
        self.kept: list[tuple[int, str]] = []
        """Objects inserted and never deleted: (partition, key)."""
        self._poison_every = poison_every
        self._number = 0

    def put(self, records: int) -> None:
        """Produce *records* more, four times a multiple of the partitions, without waiting for the broker."""
        partitions = self.ledger.partition_count
        assert records % (4 * partitions) == 0
        for _ in range(records // 4):
            number, partition = self._number, self._number % partitions
            key, deleted = f"{CANARY}/{number}", self._number % (4 * partitions) < partitions
            story: list[tuple[str, set[int]]] = [
                ("insert", {201}),
                ("get", {200, 404} if deleted else {200}),
                ("delete" if deleted else "head", {204}),
                ("head", {404} if deleted else {204}),
            ]
            for kind, statuses in story:
                held = payload_of(key)
                self.ledger.operate(
                    kind,
                    key,
                    held if kind == "insert" else b"",
                    statuses=statuses,
                    key=key.encode(),
                    partition=partition,
                    holds=held,
                    wait=False,
                )
            self.sent += len(story)
            if not deleted:
                self.kept.append((partition, key))
            self._number += 1
            if self._poison_every and self._number % self._poison_every == 0:
                value = b"\xff" + CANARY.encode()
                self.ledger.send(value, kind="unknown", statuses={400}, partition=partition, wait=False)
                self.sent += 1

    def pump(self, until: Callable[[], bool], seconds: float = PUMP_SECONDS) -> None:
        """Put in and read out until *until* holds, with a bounded number of records yet to be answered."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"no progress under load: {self.ledger.verdict()}"
            if self.sent - len(self.ledger.answers) < BACKLOG_MAX:
                self.put(self.batch)
            self.ledger.poll(0.02)
        self.ledger.flush()


class Questions(Load):
    """Looks for objects that are nowhere: for members that share no storage."""

    def put(self, records: int) -> None:
        """Produce *records* more, without waiting for the broker."""
        for _ in range(records):
            key, partition = f"{CANARY}/{self.sent}", self.sent % self.ledger.partition_count
            self.ledger.operate("head", key, statuses={404}, key=key.encode(), partition=partition, wait=False)
            self.sent += 1


def payload_of(key: str) -> bytes:
    """What is in the object of this key."""
    return key.encode() * (200 if int(key.rpartition("/")[2]) % 8 == 5 else 5)


def check_nothing_is_committed_without_its_response(stage: Stage, least: dict[int, int]) -> dict[int, int]:
    """I1, I4, I5: read everything; each record below the committed offset has its response; no commit went back."""
    committed = stage.ledger.committed(stage.group)
    stage.ledger.read_all()
    unanswered = [
        entry.id
        for entry in stage.ledger.entries.values()
        if entry.offset < committed.get(entry.partition, 0) and entry.id not in stage.ledger.answers
    ]
    assert unanswered == []
    assert all(committed.get(partition, 0) >= offset for partition, offset in least.items()), (least, committed)
    return committed


def read_back(load: Load, count: int) -> None:
    """I7: *count* of the objects whose insert was acknowledged, read through the service, are whole."""
    ledger = load.ledger
    chosen = random.Random(7).sample(load.kept, min(count, len(load.kept)))
    before = len(ledger.entries)
    for partition, key in chosen:
        ledger.operate("get", key, statuses={200}, partition=partition, holds=payload_of(key), wait=False)
    ledger.flush()
    entries = list(ledger.entries.values())[before:]
    ledger.wait_answered(entries)
    assert sorted((entry.partition, entry.object_key) for entry in entries) == sorted(chosen)
    wrong = [
        text
        for entry in entries
        for answer in ledger.answers[entry.id]
        for text in ledger.contradictions(entry, answer)
    ]
    assert not wrong, wrong[:10]


def ends(ledger: Ledger) -> dict[int, int]:
    """The offset after the last record put into each partition."""
    last: dict[int, int] = {}
    for entry in ledger.entries.values():
        last[entry.partition] = max(last.get(entry.partition, 0), entry.offset + 1)
    return last
