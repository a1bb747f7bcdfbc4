"""A stage of the end-to-end suite: topics, a configuration that names them, a ledger, and the processes on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brokers import Broker
from ledger import Ledger
from long_term import Payloads, payloads_of
from service_process import ServiceProcess, settings

RESPONSE_BYTES = 600_000
"""Responses of the suite stay below the embedded broker's fixed limit of 1 MiB a record."""


@dataclass
class Stage:
    """One service configuration on topics of its own, its ledger, and the processes started on it."""

    broker: Broker
    folder: Path
    ledger: Ledger
    config: dict[str, Any]
    processes: list[ServiceProcess] = field(default_factory=list)

    @property
    def group(self) -> str:
        """The consumer group."""
        group: str = self.config["kafka"]["group_id"]
        return group

    @property
    def payloads(self) -> Payloads:
        """The long-term tier, as others see it."""
        return payloads_of(self.config["storage"]["long_term"])

    def start(
        self,
        *,
        ready: bool = True,
        partitions: int | None = None,
        name: str = "service",
        environment: Mapping[str, str] | None = None,
    ) -> ServiceProcess:
        """Start a member of the group; wait until it is ready unless told not to."""
        service = ServiceProcess(self.folder, self.config, name=name, **(environment or {}))
        self.processes.append(service)
        if ready:
            service.wait_ready(partitions)
        return service

    def put_down(self) -> None:
        """Kill whatever still runs and release the clients."""
        for service in self.processes:
            service.kill()
        self.ledger.close()


SetStage = Callable[..., Stage]


def set_up(broker: Broker, folder: Path, partitions: int, output_partitions: int, **sections: Any) -> Stage:
    """Create topics and a configuration that names them; start nothing."""
    limit = min(broker.record_bytes_max, 8_000_000)
    operations = broker.create_topic("operations", partitions, max_message_bytes=limit)
    responses = broker.create_topic("responses", output_partitions, max_message_bytes=limit)
    dead = broker.create_topic("dead", partitions, max_message_bytes=limit)
    named: dict[str, Any] = {
        "kafka": {"bootstrap_servers": broker.bootstrap.split(","), "group_id": broker.unused_name("group")},
        "input": {"topics": [operations]},
        "output": {"topic": responses, "max_request_bytes": RESPONSE_BYTES + 100_000},
        "dead_letter": {"topic": dead},
        "limits": {"response_bytes": RESPONSE_BYTES},
    }
    config = settings(folder)
    for changes in (named, sections):
        for name, section in changes.items():
            config[name] = {**config[name], **section} if isinstance(config.get(name), dict) else section
    isolation = "read_committed" if config.get("delivery") == "exactly-once" else "read_uncommitted"
    return Stage(broker, folder, Ledger(broker, operations, responses, dead, isolation), config)
