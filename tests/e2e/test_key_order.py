"""Keys that order: what was written last to an object is what stays, however often the service is killed meanwhile.

Every object is written several times in a row, alternately large (a file and a redirect row) and small (a row), so that
the later write is the quicker one and would overtake the earlier one wherever it could. Three things are held against
that, none of them by what the service says of itself but the last:

* the object's value at the end, read back through the service, is what was written last;
* on the output topic the first responses to one object stand in the order of its operations;
* no offset map names an operation as finished of which an earlier one on the same object is not: after a kill the
  earlier one alone would run again, and undo the later one.
"""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from itertools import pairwise

import pytest

from brokers import Broker
from ledger import Entry, Ledger
from load import PARTITIONS, PUMP_SECONDS
from second_try import void_unless
from service_process import ServiceProcess, command_line
from stages import SetStage

ROUNDS = int(os.environ.get("TIERSTREAM_TEST_SOAK_ROUNDS", "3"))
"""Kills; `make soak` sets many."""

LARGE_BYTES = 40_000
SMALL_BYTES = 100
"""Above and below the threshold of the tiers."""

WRITES_MAX = 5
"""Writes to one object."""


class Rewrites:
    """Objects without end, each written 2 to :data:`WRITES_MAX` times; every fifth one is deleted at last."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger = ledger
        self.last: dict[tuple[int, str], bytes | None] = {}
        """What was written last, None for deleted, by partition and object."""
        self._chance = random.Random(seed)
        self._number = 0

    def put(self, objects: int) -> None:
        """Write so many objects, all writes of one beside each other."""
        for _ in range(objects):
            number, partition = self._number, self._number % PARTITIONS
            name = f"rewrite/{number}"
            writes = self._chance.randint(2, WRITES_MAX)
            for write in range(writes):
                size = LARGE_BYTES if write % 2 == 0 else SMALL_BYTES
                payload = b"%s is written %d\n" % (name.encode(), write) + self._chance.randbytes(size)
                self.ledger.operate("insert", name, payload, statuses={201}, partition=partition, wait=False)
                self.last[partition, name] = payload
            if number % 5 == 0:
                self.ledger.operate("delete", name, statuses={204}, partition=partition, wait=False)
                self.last[partition, name] = None
            self._number += 1
        self.ledger.flush()


def operations_by_object(ledger: Ledger) -> dict[tuple[int, str], list[Entry]]:
    """The operations on each object, in input order."""
    found: defaultdict[tuple[int, str], list[Entry]] = defaultdict(list)
    for entry in sorted(ledger.entries.values(), key=lambda entry: entry.offset):
        key = ledger.answers[entry.id][0].response["key"]
        found[entry.partition, key].append(entry)
    return found


def finished_above(service: ServiceProcess) -> dict[int, tuple[int, set[int]]]:
    """What the group has committed: partition to offset and to what the offset map says is finished above it."""
    path = service.log.with_suffix(".yaml")
    done = command_line("offset-map", "show", "--json", "--config", str(path), cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return {
        row["partition"]: (
            row["base"],
            {offset for first, last in row["finished"] for offset in range(first, last + 1)},
        )
        for row in json.loads(done.stdout)
        if row["valid"]
    }


@pytest.mark.slow
@pytest.mark.timeout(120 + PUMP_SECONDS * (ROUNDS + 1))
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_what_was_written_last_stays_through_kills(apache: Broker, set_stage: SetStage, delivery: str) -> None:
    """I7, contract 3, 4: insert A, insert B on one object never ends as A; no response leaves early.

    H22, H25: in transactions, a kill leaves one open, which the next owner ends before it reads where to begin.
    """
    stage = set_stage(
        apache,
        partitions=PARTITIONS,
        delivery=delivery,
        storage={"threshold": "4KiB"},
        commit={"interval": "50ms", "transaction_interval": "50ms"},
    )
    ledger, rewrites, chance = stage.ledger, Rewrites(stage.ledger, seed=ROUNDS), random.Random(ROUNDS)
    maps: list[dict[int, tuple[int, set[int]]]] = []
    killed_with_work = 0
    for _ in range(ROUNDS):
        service = stage.start(partitions=PARTITIONS)
        rewrites.put(600)
        ledger.wait_answered(at_least=len(ledger.answers) + chance.randint(200, 1200), seconds=PUMP_SECONDS)
        rewrites.put(200)  # it may have answered all by now
        service.kill()
        maps.append(finished_above(service))
        killed_with_work += ledger.answered() < len(ledger.entries)
    service = stage.start(partitions=PARTITIONS)
    ledger.wait_answered(seconds=PUMP_SECONDS)
    written = operations_by_object(ledger)
    reads = {
        (partition, name): ledger.operate("get", name, statuses={200, 404}, partition=partition, wait=False)
        for partition, name in rewrites.last
    }
    ledger.flush()
    ledger.wait_answered(seconds=PUMP_SECONDS)
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched) == ([], []), verdict
    assert delivery == "at-least-once" or verdict.duplicated == {}
    wrong = {}
    for (partition, name), (entry,) in reads.items():
        found = ledger.answers[entry.id][0].response
        value = found["result"][1]["object"]["payload"] if found["status"] == 200 else None
        if value != rewrites.last[partition, name]:
            wrong[name] = None if value is None else value[:40]
    assert wrong == {}, f"{len(wrong)} of {len(reads)} objects hold what was written before"
    overtaken = [
        (earlier.id, later.id)
        for entries in written.values()
        for earlier, later in pairwise(entries)
        if min(answer.offset for answer in ledger.answers[earlier.id])
        > min(answer.offset for answer in ledger.answers[later.id])
    ]
    assert overtaken == []
    ahead = [
        (earlier.id, later.id)
        for found in maps
        for entries in written.values()
        for earlier, later in pairwise(entries)
        if earlier.partition in found
        and later.offset in found[earlier.partition][1]
        and earlier.offset >= found[earlier.partition][0]
        and earlier.offset not in found[earlier.partition][1]
    ]
    assert ahead == []
    entries_in_maps = sum(len(above) for found in maps for _, above in found.values())
    print(f"{len(reads)} objects, {len(ledger.entries)} operations, {ROUNDS} kills, {entries_in_maps} offsets in maps")
    void_unless(killed_with_work == ROUNDS, "the kills hit an idle service")
    void_unless(entries_in_maps > 0, "no kill found work above a gap")
