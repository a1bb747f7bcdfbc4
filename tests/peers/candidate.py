"""tierstream as a candidate of the peers' runner: a configuration from its environment, then the service itself.

Called with the number of members and with ``NAME=VALUE`` settings, such as ``ordering=unordered``. Everything else is
as shipped: Avro decoded and encoded, responses acknowledged, offset map, the handler's retries and time limits. The
memory tiers take the workload's wait; each member has its own, as records of one object are in one partition, and an
equal share of the permits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any


def settings(environment: dict[str, str], changes: list[str], members: int = 1) -> dict[str, Any]:
    """Return the configuration of each of *members* for one run."""
    memory = {"type": "memory", "latency": f"{environment['LATENCY_MS']}ms"}
    config: dict[str, Any] = {
        "kafka": {"bootstrap_servers": [environment["BOOTSTRAP"]], "group_id": environment["GROUP"]},
        "input": {"topics": [environment["INPUT"]]},
        "output": {"topic": environment["OUTPUT"], "compression": "none", "max_request_bytes": "1000000"},
        "limits": {"response_bytes": "900000", "record_bytes": "1000000"},
        "dead_letter": {"topic": None},
        "concurrency": {"limit": int(environment["CONCURRENCY"]) // members},
        "window": {"policy": "equal-share"},
        "commit": {"interval": "200ms"},
        "storage": {"high_volume": memory, "long_term": {"type": "memory"}, "change_log": {"type": "memory"}},
        "admin": {"port": 0},
    }
    for change in changes:
        name, _, value = change.partition("=")
        *sections, last = name.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = int(value) if value.isdigit() else value
    return config


def main() -> None:
    """Write the configuration, and be the member, or start the members and end with them."""
    count, *changes = sys.argv[1:]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        json.dump(settings(dict(os.environ), changes, int(count)), file)  # JSON is YAML
    command = [sys.executable, "-m", "consumer", "run", "--config", file.name]
    os.chdir(os.environ["CANDIDATE_PACKAGE"])  # where `-m` looks first
    if count == "1":  # in this very process: one that only waits would be counted as well
        os.execv(command[0], command)
    members = [subprocess.Popen(command) for _ in range(int(count))]

    def stop(*_: object) -> None:
        for member in members:
            member.terminate()

    signal.signal(signal.SIGTERM, stop)
    sys.exit(max(abs(member.wait()) for member in members))


if __name__ == "__main__":
    main()
