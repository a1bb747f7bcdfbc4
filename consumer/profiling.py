"""What a record costs, stage by stage, in the running service: the process samples itself (``bench --profile``).

1. The service is run as ever, in a process whose CPU time is looked at every :data:`SAMPLE_SECONDS`: the kernel sends a
   signal after so much of it, and the handler sees the Python frame that was being executed.
2. From that frame outwards the first one that belongs to a *stage* decides. Helpers, the standard library and C code so
   count for whoever called them. Reading from sockets is nobody's call: it is the stage ``network``; what no frame
   decides is ``loop``, the event loop itself.
3. SIGUSR2 begins the count, so that the start of the process is left out; the second one ends it and writes the counts.

Compiled modules have no frames (``hatch_build.py``): reading and writing Avro then counts for who asks for it, decoding
for *dispatch* therefore.

A share of the samples times the CPU time a record, as the kernel has counted it, is a stage's cost; all stages
together are all of the cost. It is an estimate: of n samples in all, a stage of share p is off by sqrt(p(1 - p)/n),
and time in C is seen when it returns.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from consumer import app
from consumer.config import load

if TYPE_CHECKING:
    from types import CodeType, FrameType

SAMPLE_SECONDS: Final = 0.002
"""CPU time between two samples; the kernel rounds it up to its own clock's tick, mostly 4 ms. A sample takes some ten
microseconds."""

STAGES: Final = (
    "fetch",
    "decode",
    "dispatch",
    "storage",
    "encode",
    "produce",
    "track",
    "commit",
    "network",
    "loop",
)
"""In the order of a record's way; the last two are shared by all."""

_DECIDES: Final[dict[str, str]] = {
    # Ours, by module, or by module and the beginning of a function's name; the longest one that fits.
    "consumer.kafka.poller": "fetch",
    "consumer.assignment:Assignment.receive": "fetch",
    "consumer.assignment:_Entry": "fetch",
    "consumer.codec:OperationDecoder": "decode",
    "consumer.codec:_Reader": "decode",
    "consumer.prescan": "decode",
    "consumer.assignment": "dispatch",
    "consumer.executor": "dispatch",
    "consumer.handler": "dispatch",
    "consumer.permits": "dispatch",
    "consumer.storage": "storage",
    "consumer.codec:ResponseEncoder": "encode",
    "consumer.responses": "encode",
    "consumer.assignment:Assignment._answer": "encode",
    "consumer.assignment:Assignment._respond": "encode",
    "consumer.assignment:Assignment._letter": "encode",
    "consumer.kafka.publisher": "produce",
    "consumer.kafka.transactions": "produce",
    "consumer.offsets": "track",
    "consumer.assignment:Assignment._next_chunk": "track",
    "consumer.assignment:Assignment.acknowledged": "track",
    "consumer.assignment:Assignment.dead_letter_acknowledged": "track",
    "consumer.assignment:Assignment._finish": "track",
    "consumer.assignment:Assignment.settle": "track",
    "consumer.kafka.poller:Poller._resolved": "track",
    "consumer.assignment:Assignment.offset_map": "commit",
    "consumer.kafka.poller:Poller._commit": "commit",
    "consumer.kafka.poller:Poller._send_commit": "commit",
    "consumer.offset_map": "commit",
    "consumer.commits": "commit",
    # The client's.
    "aiokafka.consumer.fetcher": "fetch",
    "aiokafka.consumer.group_coordinator": "commit",
    "aiokafka.producer": "produce",
}

_NETWORK: Final = ("aiokafka.conn", "aiokafka.protocol", "asyncio.streams", "asyncio.selector_events")
"""Modules that move bytes for whoever calls them, and for nobody when they read."""


def stage_of(module: str, function: str) -> str | None:
    """Return the stage that a function decides, by its module and qualified name; None where its caller decides."""
    package, fitting = module, ""
    while package:
        for place in (place for place in _DECIDES if place.partition(":")[0] == package):
            name = place.partition(":")[2]
            if len(place) > len(fitting) and function.startswith(name):
                fitting = place
        if fitting:
            return _DECIDES[fitting]
        package = package.rpartition(".")[0]
    return None


class Sampler:
    """Counts samples by stage; one to a process, since signals are."""

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self._stages: dict[CodeType, str | None] = {}

    def count(self, frame: FrameType | None) -> None:
        """Count what *frame* is at work for."""
        shared = "loop"
        while frame is not None:
            code = frame.f_code
            if code in self._stages:
                stage = self._stages[code]
            else:
                module = frame.f_globals.get("__name__", "")
                stage = stage_of(module, code.co_qualname)
                if stage is None and module.startswith(_NETWORK):
                    stage = "network"
                self._stages[code] = stage
            if stage == "network":
                shared = stage
            elif stage is not None:
                shared = stage
                break
            frame = frame.f_back
        self.samples[shared] += 1

    def install(self, output: Path) -> None:
        """Begin to count at the first SIGUSR2; at the second stop, and write the counts to *output*."""
        begun = False

        def sample(_signal: int, frame: FrameType | None) -> None:
            self.count(frame)

        def toggle(_signal: int, _frame: FrameType | None) -> None:
            nonlocal begun
            if not begun:
                begun = True
                signal.setitimer(signal.ITIMER_PROF, SAMPLE_SECONDS, SAMPLE_SECONDS)
                return
            signal.setitimer(signal.ITIMER_PROF, 0)
            partial = output.with_suffix(".part")
            partial.write_bytes(orjson.dumps(self.samples))
            partial.rename(output)  # whoever waits for it finds it whole

        signal.signal(signal.SIGPROF, sample)
        signal.signal(signal.SIGUSR2, toggle)


def main(config: Path, output: Path) -> int:
    """Run the service with the configuration in *config*, sampled into *output*; return its exit code."""
    Sampler().install(output)
    return app.main(load(config))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
