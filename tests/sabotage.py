"""A service process that something is done to from within: faults of its libraries that nothing outside can provoke.

The child imports ``sitecustomize`` from a folder of the test before anything else. The service's own code has no hook
for this.
"""

from __future__ import annotations

from pathlib import Path

from service_process import ROOT

_REMEMBERING = """
import signal

import aiokafka

made = {}


def remember(kind):
    make = kind.__init__

    def remembering(self, *arguments, **settings):
        make(self, *arguments, **settings)
        made[kind] = self

    kind.__init__ = remembering


def do_it(*_signal):
    consumer, producer = made[aiokafka.AIOKafkaConsumer], made[aiokafka.AIOKafkaProducer]
    FAULT


remember(aiokafka.AIOKafkaConsumer)
remember(aiokafka.AIOKafkaProducer)
signal.signal(signal.SIGUSR2, do_it)
"""


def sabotage(folder: Path, code: str) -> dict[str, str]:
    """Return the environment of a child that runs *code* at its start; it is kept below *folder*."""
    own = folder / "sabotage"
    own.mkdir(exist_ok=True)
    (own / "sitecustomize.py").write_text(code, encoding="utf-8")
    return {"PYTHONPATH": f"{own}:{ROOT}"}


def on_signal(fault: str) -> str:
    """Return code that does *fault* on SIGUSR2, to ``consumer`` or ``producer``, the service's newest clients."""
    return _REMEMBERING.replace("FAULT", fault)
