"""The table of peers: tierstream beside other Kafka consumers, on one broker, in one run (``make bench-peers``).

1. The folder of the peers (runner and drivers) is copied to ``.cache/peers``, with an environment for each, once.
2. Apache Kafka is started as in the tests.
3. Their runner runs tierstream's variants and every peer, interleaved, and counts by itself.
4. What it found goes to ``docs/benchmarks.md``, with the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from brokers import kafka_version, maven_broker

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / ".cache" / "peers"

CANDIDATES = {
    "tierstream-unordered": ["1", "ordering=unordered"],
    "tierstream-key": ["1", "ordering=key"],
    "tierstream-unordered-exactly-once": ["1", "ordering=unordered", "delivery=exactly-once"],
    "tierstream-key-exactly-once": ["1", "ordering=key", "delivery=exactly-once"],
    "tierstream-key-2-members": ["2", "ordering=key"],
}
"""How many members, and their settings."""

PEERS = (
    "aiokafka-gather",
    "aiokafka-window-uvloop",
    "aiokafka-sendbatch-uvloop",
    "aiokafka-keyed-uvloop",
    "pc-unordered",
    "pc-key",
    "pc-reactor-unordered",
    "pc-reactor-key",
    "faststream-batch",
    "faststream-concurrent",
    "pyrallel-unordered",
    "pyrallel-key",
    "faust",
    "quixstreams",
    "arroyo-threads-bigbuffer",
)


def prepare(source: Path) -> None:
    """Copy the peers and build what they need, once."""
    if (WORK / ".ready").exists():
        return
    sys.stdout.write(f"==> preparing the peers in {WORK.relative_to(ROOT)} (minutes, once)\n")
    shutil.copytree(source, WORK, dirs_exist_ok=True)
    done = subprocess.run(["sh", "setup.sh"], cwd=WORK, check=False)
    if done.returncode != 0:
        sys.exit("hint: the peers want python3.11 and python3.12; PYTHON=... and PYTHON312=... say where they are")
    (WORK / ".ready").touch()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run them all; return what the runner wrote."""
    result = WORK / "out.json"
    with tempfile.TemporaryDirectory() as folder, maven_broker(Path(folder)) as broker:
        command = [WORK / ".venv/runner/bin/python", "run.py", "--bootstrap", broker.bootstrap]
        command += ["--peers", ",".join(arguments.peers), "--latency-ms", arguments.latency_ms]
        command += ["--runs", str(arguments.runs), "--seconds", str(arguments.seconds), "--json", result]
        command += ["--candidate-input-maker", "records:make", "--candidate-output-id", "records:id_of"]
        for name in arguments.candidates:
            said = [sys.executable, str(HERE / "candidate.py"), *CANDIDATES[name]]
            command += ["--candidate", shlex.join(said), "--candidate-name", name]
        environment = os.environ | {"PYTHONPATH": str(HERE)}
        subprocess.run([str(part) for part in command], cwd=WORK, env=environment, check=True)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def page(found: dict[str, Any]) -> str:
    """Return ``docs/benchmarks.md``."""
    meta = found["meta"]
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench-peers`: every row on one Apache Kafka, in one run, interleaved; rates are medians of",
        f"{meta['runs']} runs. Compare rows of this table with each other, not with those of another run.",
        "",
        f"* {meta['partitions']} partitions, {meta['value_bytes']} bytes a record, {meta['keys']} keys, at most",
        f"  {meta['concurrency']} in flight; {meta['cores']} cores shared by broker, peer and reader;",
        f"  {platform.machine()}, Python {platform.python_version()}, Apache Kafka {kafka_version()},",
        f"  aiokafka {version('aiokafka')}; {meta['started']}.",
        "* An operation waits for 0, 5 or 20 ms and is answered; each response is acknowledged before its offset is",
        "  committed. tierstream decodes and encodes Avro, keeps its offset map and stores in its memory tier.",
        "* *Second half*: the rate over the last half of the responses, when a JVM is warm.",
        "",
    ]
    for latency in sorted({row["latency_ms"] for row in found["summary"]}):
        lines += [
            f"## Operations of {latency} ms",
            "",
            "| | responses/s | from - to | second half | CPU s per 100,000 | MB | twice | unanswered | out of order |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in found["summary"]:
            if row["latency_ms"] == latency:
                ends = "" if row["ends"] == ["complete"] else f" ({'; '.join(row['ends'])})"
                lines.append(
                    f"| {row['peer']}{ends} | {_number(row['throughput_median'])} "
                    f"| {_number(row['throughput_min'])} - {_number(row['throughput_max'])} "
                    f"| {_number(row['throughput_second_half_median'])} | {_number(row['cpu_s_per_100k'], 2)} "
                    f"| {_number(row['max_rss_mb'])} | {row['duplicates']} | {row['lost']} "
                    f"| {_number(row['out_of_order'])} |"
                )
        lines.append("")
    return "\n".join(lines)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def main() -> None:
    """Run what the arguments say and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the peers: runner, drivers, setup.sh")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS))
    parser.add_argument("--candidates", type=lambda text: text.split(","), default=list(CANDIDATES))
    parser.add_argument("--latency-ms", default="0,5,20")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of one run")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    prepare(arguments.source)
    arguments.output.write_text(page(run(arguments)), encoding="utf-8")
    sys.stdout.write(f"==> written: {arguments.output}\n")


if __name__ == "__main__":
    main()
