"""Keys that order: what was written last to an object is what stays, however often the service is killed meanwhile.

Every object is written several times in a row, alternately large (a file and a redirect row) and small (a row), so that
the later write is the quicker one and would overtake the earlier one wherever it could. Three things are held against
that, none of them by what the service says of itself but the last:

* the object's value at the end, read back through the service, is what was written last;
* on the output topic the first responses to one object stand in the order of its operations;
* no offset map names an operation as finished of which an earlier one on the same object is not: after a kill the
  earlier one alone would run again, and undo the later one.

`e2e/test_key_order.py` plays a few rounds of it, `soak.py` many.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

from chaos_plan import Delivery
from fleet import Findings
from group_history import bury
from ledger import Answer, Entry, Ledger
from load import PARTITIONS, PUMP_SECONDS
from service_process import ServiceProcess, command_line
from stages import Stage

CLIENT_ID = "rewriter"

SETTINGS: dict[str, Any] = {
    "kafka": {"client_id": CLIENT_ID},
    "storage": {"threshold": "4KiB"},
    "commit": {"interval": "50ms", "transaction_interval": "50ms"},
}
"""Of the service: small and large objects are easily made, and much is committed while it works."""

LARGE_BYTES = 40_000
SMALL_BYTES = 100
"""Above and below the threshold of the tiers."""

WRITES_MAX = 5
"""Writes to one object."""

OBJECTS_OF_A_ROUND = 600
OBJECTS_BEFORE_THE_KILL = 200
"""Put in just before the kill, as all may have been answered by then."""

UNBURIED = 0.2
"""The share of kills of which the broker has to find out by itself, once the dead member's session has run out; where
the broker is ours, the others' sessions are ended at once."""

Name = tuple[int, str]
"""Partition and key of an object."""

Answers = Mapping[str, list[Answer]]
"""Responses by response id."""

OffsetMaps = Mapping[int, tuple[int, set[int]]]
"""Partition to the offset committed and to what the offset map says is finished above it."""


class Rewrites:
    """Objects without end, each written 2 to :data:`WRITES_MAX` times; every fifth one is deleted at last."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger = ledger
        self.last: dict[Name, bytes | None] = {}
        """What was written last, None for deleted."""
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


def play(stage: Stage, rounds: int, seed: int, delivery: Delivery) -> Findings:
    """Kill the service *rounds* times while objects are rewritten; read all of them back, and judge.

    Raises:
        TimeoutError: records were not answered.
    """
    ledger, rewrites, chance = stage.ledger, Rewrites(stage.ledger, seed), random.Random(seed)
    maps: list[OffsetMaps] = []
    happened: Counter[str] = Counter()
    for _ in range(rounds):
        service = stage.start(partitions=PARTITIONS)
        rewrites.put(OBJECTS_OF_A_ROUND)
        ledger.wait_answered(at_least=len(ledger.answers) + chance.randint(200, 1200), seconds=PUMP_SECONDS)
        rewrites.put(OBJECTS_BEFORE_THE_KILL)
        service.kill()
        maps.append(finished_above(service))
        happened["kills"] += 1
        happened["kills with work left"] += ledger.answered() < len(ledger.entries)
        if stage.broker.nodes and chance.random() >= UNBURIED:
            happened["sessions ended by hand"] += bury(stage.broker, stage.group, CLIENT_ID)
    service = stage.start(partitions=PARTITIONS)
    ledger.wait_answered(seconds=PUMP_SECONDS)
    written = operations_by_object(ledger)
    reads: dict[Name, list[Entry]] = {}
    # Their payloads stand in the responses: with all of them waiting, hundreds of megabytes, one fetch is larger than
    # what the ledger's reader can take over in one of its short looks, and is thrown away again and again.
    for some in in_portions(rewrites.last, OBJECTS_OF_A_ROUND):
        for partition, name in some:
            reads[partition, name] = ledger.operate("get", name, statuses={200, 404}, partition=partition, wait=False)
        ledger.flush()
        ledger.wait_answered(seconds=PUMP_SECONDS)
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    happened["operations finished above a gap at a kill"] = sum(
        len(above) for found in maps for _, above in found.values()
    )
    happened["objects deleted at last"] = sum(payload is None for payload in rewrites.last.values())
    wrong = [
        *(f"I1: {name} was never answered" for name in verdict.missing),
        *(f"I3: {text}" for text in verdict.mismatched),
        *stale(ledger.answers, reads, rewrites.last),
        *overtaken(ledger.answers, written.values()),
        *(text for found in maps for text in ahead(found, written.values())),
    ]
    if delivery == "exactly-once" and verdict.duplicated:
        wrong.append(f"I2: {verdict.surplus} responses repeated, such as {list(verdict.duplicated)[:3]}")
    figures: dict[str, float] = {"objects": len(reads), "records": len(ledger.entries), "repeated": verdict.surplus}
    return Findings(wrong, happened, figures)


def in_portions(names: Iterable[Name], size: int) -> Iterator[list[Name]]:
    """Yield so many of *names* at a time."""
    rest = iter(names)
    while some := list(islice(rest, size)):
        yield some


def operations_by_object(ledger: Ledger) -> dict[Name, list[Entry]]:
    """The operations on each object, in input order."""
    found: defaultdict[Name, list[Entry]] = defaultdict(list)
    for entry in sorted(ledger.entries.values(), key=lambda entry: entry.offset):
        key = ledger.answers[entry.id][0].response["key"]
        found[entry.partition, key].append(entry)
    return found


def finished_above(service: ServiceProcess) -> OffsetMaps:
    """What the group has committed."""
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


def stale(answers: Answers, reads: Mapping[Name, list[Entry]], last: Mapping[Name, bytes | None]) -> Iterator[str]:
    """I7: objects that hold what was written before."""
    for (partition, name), (entry,) in reads.items():
        found = answers[entry.id][0].response
        value = found["result"][1]["object"]["payload"] if found["status"] == 200 else None
        if value != last[partition, name]:
            yield f"I7: {name} holds {value and value[:40]!r}, which is not what was written last"


def overtaken(answers: Answers, written: Iterable[list[Entry]]) -> Iterator[str]:
    """Operations whose first response stands behind that to a later one on the same object."""
    first = {name: min(answer.offset for answer in copies) for name, copies in answers.items() if copies}
    for entries in written:
        for earlier, later in pairwise(entries):
            if first[earlier.id] > first[later.id]:
                yield f"the response to {later.id} stands before that to {earlier.id}, on the same object"


def ahead(found: OffsetMaps, written: Iterable[list[Entry]]) -> Iterator[str]:
    """Operations that an offset map names as finished though an earlier one on the same object is not."""
    for entries in written:
        for earlier, later in pairwise(entries):
            base, above = found.get(earlier.partition, (0, set()))
            if later.offset in above and earlier.offset >= base and earlier.offset not in above:
                yield f"an offset map holds {later.id}, and not {earlier.id} before it on the same object"
