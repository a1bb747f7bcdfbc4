"""The table of peers: tierstream beside other Kafka consumers, on one broker, in one run (``make bench-peers``).

1. The folder of the peers (runner and drivers) is copied to ``.cache/peers``, with an environment for each, once.
2. Apache Kafka is started as in the tests, but with everything its virtual machine can do.
3. tierstream is compiled (``hatch_build.py``) where this machine can do that, and the page says whether it was.
4. Their runner runs tierstream's variants and every peer, interleaved, and counts by itself.
5. What it found goes to ``docs/benchmarks.md``, with the machine, the versions, and the goals beside what came of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from brokers import kafka_version, maven_broker

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / ".cache" / "peers"

CANDIDATES = {
    "tierstream-unordered": ["1", "ordering=unordered"],
    "tierstream-key": ["1", "ordering=key"],
    "tierstream-key-exactly-once": ["1", "ordering=key", "delivery=exactly-once"],
    "tierstream-key-2-processes": ["2", "ordering=key"],
}
"""How many members, and their settings. Two processes are two members of the group with half of the permits each, and
not ``runtime.processes: 2``, which a memory tier refuses, as each process would have its own."""

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

BROKER = ("-XX:TieredStopAtLevel=4", "-Xms1g", "-Xmx1g")
"""Of the broker's virtual machine: in the tests it is to start quickly, here it is to be out of the way."""

PACKAGES = {
    "aiokafka": "aiokafka",
    "faststream": "faststream",
    "quixstreams": "quixstreams",
    "faust": "faust-streaming",
}
"""Environment of a peer to the package that it is; their versions are told."""

Row: TypeAlias = dict[str, Any]
"""What the runner sums up of one peer at one latency."""


@dataclass(frozen=True)
class Goal:
    """One quantity of one row over that of another row of the same latency."""

    name: str
    of: str
    over: str
    quantity: str = "throughput_median"
    at_least: float | None = None
    at_most: float | None = None
    latencies: tuple[int, ...] = (0, 5, 20)

    def text(self) -> str:
        """Say the bound."""
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def met(self, ratio: float) -> bool:
        """Tell whether *ratio* keeps the bound."""
        return (
            ratio >= self.at_least if self.at_least is not None else self.at_most is not None and ratio <= self.at_most
        )


def _beside_parallel_consumer(ordering: str) -> tuple[Goal, ...]:
    ours, theirs, warm = f"tierstream-{ordering}", f"pc-{ordering}", "throughput_second_half_median"
    return (
        Goal(f"{ordering}: rate over Parallel Consumer's, warm", ours, theirs, warm, at_least=1.0),
        Goal(f"{ordering}: CPU over Parallel Consumer's", ours, theirs, "cpu_s_per_100k", at_most=0.6),
        Goal(f"{ordering}: memory over Parallel Consumer's", ours, theirs, "max_rss_mb", at_most=0.2),
    )


GOALS = (
    Goal(
        "rate over the `send_batch` loop's",
        "tierstream-unordered",
        "aiokafka-sendbatch-uvloop",
        at_least=0.95,
        latencies=(5, 20),
    ),
    Goal(
        "rate over the `send_batch` loop's",
        "tierstream-unordered",
        "aiokafka-sendbatch-uvloop",
        at_least=0.33,
        latencies=(0,),
    ),
    *_beside_parallel_consumer("unordered"),
    *_beside_parallel_consumer("key"),
    Goal("rate over Quix Streams'", "tierstream-unordered", "quixstreams", at_least=1.0, latencies=(0,)),
    Goal("rate over Quix Streams'", "tierstream-unordered", "quixstreams", at_least=3.0, latencies=(5, 20)),
    Goal("rate over FastStream's", "tierstream-unordered", "faststream-batch", at_least=1.0, latencies=(0,)),
    Goal("rate over FastStream's", "tierstream-unordered", "faststream-batch", at_least=3.0, latencies=(5, 20)),
    Goal("exactly-once over at-least-once", "tierstream-key-exactly-once", "tierstream-key", at_least=0.6),
    Goal(
        "two processes over one, second half",
        "tierstream-key-2-processes",
        "tierstream-key",
        "throughput_second_half_median",
        at_least=1.6,
    ),
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


def compile_tierstream(folder: Path) -> bool:
    """Put the compiled package into *folder*; False, and the reason is told, where this machine cannot compile it."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder / "wheel"],
        cwd=ROOT,
        env=os.environ | {"TIERSTREAM_COMPILE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        if "TIERSTREAM_COMPILE=1 needs" not in done.stderr:
            sys.exit(done.stderr)
        sys.stdout.write(f"==> measured uncompiled: {done.stderr}")
        return False
    (wheel,) = (folder / "wheel").glob("*.whl")
    shutil.unpack_archive(wheel, folder, "zip")
    return True


def run(arguments: argparse.Namespace, package: Path) -> dict[str, Any]:
    """Run them all, tierstream from the folder *package*; return what the runner wrote."""
    result = WORK / "out.json"
    with tempfile.TemporaryDirectory() as folder, maven_broker(Path(folder), java_settings=BROKER) as broker:
        command = [WORK / ".venv/runner/bin/python", "run.py", "--bootstrap", broker.bootstrap]
        command += ["--broker-pid", str(broker.node.pid), "--peers", ",".join(arguments.peers) or "none"]
        command += ["--latency-ms", arguments.latency_ms, "--runs", str(arguments.runs)]
        command += ["--seconds", str(arguments.seconds), "--records", arguments.records, "--json", result]
        command += ["--candidate-input-maker", "records:make", "--candidate-output-id", "records:id_of"]
        for name in arguments.candidates:
            said = [sys.executable, str(HERE / "candidate.py"), *CANDIDATES[name]]
            command += ["--candidate", shlex.join(said), "--candidate-name", name]
        environment = os.environ | {"PYTHONPATH": str(HERE), "CANDIDATE_PACKAGE": str(package)}
        subprocess.run([str(part) for part in command], cwd=WORK, env=environment, check=True)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


# ------------------------------------------------------------------------------------------------------- the page


_HEAD = """\
# Benchmarks

Made by `make bench-peers`: every row on one Apache Kafka, in one run, interleaved; rates are medians of {runs} runs.
Compare rows of this table with each other, not with those of another run.

* {partitions} partitions, {value_bytes} bytes a record, {keys} keys, at most {concurrency} in flight; {cores} cores
  shared by broker, peer and reader. {started}.
{machine}
* An operation waits for so long and is answered; each response is acknowledged before its offset is committed.
  tierstream decodes and encodes Avro, keeps its offset map and stores in its memory tier. The `aiokafka-…` loops do
  none of that, nor retries, dead letters, rebalances or metrics: they are what the client allows.
* *Second half*: the rate over the last half of the responses, when a JVM is warm and a second process has joined the
  group. *Twice* and *unanswered*: over all runs. *Other load*: cores that something else on the machine took; where it
  is not near 0, the row is not worth much. CPU and memory are those of the peer's processes, without the broker.
"""

_COLUMNS = (
    "responses/s",
    "from - to",
    "second half",
    "CPU s per 100,000",
    "peak MB",
    "twice",
    "unanswered",
    "out of order",
    "other load",
)


def page(found: dict[str, Any], machine: list[str]) -> str:
    """Return ``docs/benchmarks.md``: what was *found* on a *machine* described in lines."""
    rows = found["summary"]
    lines = [_HEAD.format(machine="\n".join(machine), **found["meta"])]
    for latency in sorted({row["latency_ms"] for row in rows}):
        lines += [
            f"## Operations of {latency} ms",
            "",
            *_most(found["meta"]["concurrency"], latency),
            f"| | {' | '.join(_COLUMNS)} |",
            f"| --- |{' ---: |' * len(_COLUMNS)}",
            *[_line(row) for row in rows if row["latency_ms"] == latency],
            "",
        ]
    return "\n".join([*lines, *_goal_lines(rows)])


def _most(concurrency: int, latency: float) -> list[str]:
    """Say what nobody can exceed."""
    if not latency:
        return []
    return [f"{concurrency:,} in flight allow {concurrency / latency * 1000:,.0f} a second, whoever it is.", ""]


def _line(row: Row) -> str:
    ends = "" if row["ends"] == ["complete"] else f" ({'; '.join(row['ends'])})"
    cells = (
        row["peer"] + ends,
        _number(row["throughput_median"]),
        f"{_number(row['throughput_min'])} - {_number(row['throughput_max'])}",
        _number(row["throughput_second_half_median"]),
        _number(row["cpu_s_per_100k"], 2),
        _number(row["max_rss_mb"]),
        str(row["duplicates"]),
        str(row["lost"]),
        _number(row["out_of_order"]),
        _number(row["foreign_cores"], 2),
    )
    return f"| {' | '.join(cells)} |"


def _goal_lines(rows: list[Row]) -> list[str]:
    found = {(row["peer"], row["latency_ms"]): row for row in rows}
    lines = []
    for goal in GOALS:
        cells = []
        for latency in goal.latencies:
            one, other = found.get((goal.of, latency)), found.get((goal.over, latency))
            if one is None or other is None or not one[goal.quantity] or not other[goal.quantity]:
                continue
            ratio = one[goal.quantity] / other[goal.quantity]
            cells.append(f"{latency} ms: {ratio:.2f}{'' if goal.met(ratio) else ' **missed**'}")
        if cells:
            lines.append(f"| {goal.name} | {goal.text()} | {'; '.join(cells)} |")
    if not lines:
        return []
    return ["## Goals", "", "| | goal | found |", "| --- | --- | --- |", *lines, ""]


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def describe_machine(*, compiled: bool) -> list[str]:
    """Return lines of a list: hardware, system, and the versions and forms of everything that took part."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    java = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr.partition("\n")[0]
    hardware = f"{model[1] if model else platform.machine()}, {int(memory[1]) // 1024**2 if memory else '?'} GiB"
    form = "compiled (`make compiled`)" if compiled else "not compiled"
    libraries = f"aiokafka {version('aiokafka')}, uvloop {version('uvloop')}"
    return [
        f"* {hardware}, {platform.system()} {platform.release()}.",
        f"* Python {platform.python_version()}, Apache Kafka {kafka_version()} on {java}.",
        f"* tierstream {version('tierstream')}, {form}, with {libraries}; peers: {', '.join(_peers_versions())}.",
    ]


def _peers_versions() -> list[str]:
    found = []
    for environment, package in PACKAGES.items():
        name = f"{package.replace('-', '_')}-"
        installed = (WORK / ".venv" / environment).glob(f"lib/python*/site-packages/{name}*.dist-info")
        found += [f"{package} {info.stem.removeprefix(name)}" for info in installed]
    name = "parallel-consumer-core-"
    jars = (WORK / "java" / "ParallelConsumer" / "target" / "libs").glob(f"{name}*.jar")
    return [*found, *[f"Parallel Consumer {jar.stem.removeprefix(name)}" for jar in jars]]


def _names(known: tuple[str, ...]) -> Any:
    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name and name != "none"]
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}, or none")
        return names

    return read


def main() -> None:
    """Run what the arguments say and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the peers: runner, drivers, setup.sh")
    parser.add_argument("--peers", type=_names(PEERS), default=list(PEERS), help="names with commas between, or none")
    parser.add_argument("--candidates", type=_names(tuple(CANDIDATES)), default=list(CANDIDATES), help="as --peers")
    parser.add_argument("--uncompiled", action="store_true", help="measure tierstream as it runs from a checkout")
    parser.add_argument("--latency-ms", default="0,5,20", help="what an operation waits for")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of one run, which sizes its records")
    parser.add_argument("--records", default="auto", help="records of every run, instead of --seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    prepare(arguments.source)
    with tempfile.TemporaryDirectory() as folder:
        compiled = not arguments.uncompiled and compile_tierstream(Path(folder))
        found = run(arguments, Path(folder) if compiled else ROOT)
    arguments.output.write_text(page(found, describe_machine(compiled=compiled)), encoding="utf-8")
    sys.stdout.write(f"==> written: {arguments.output}\n")


if __name__ == "__main__":
    main()
