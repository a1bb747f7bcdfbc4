"""Whether a record costs more than it did: a look that takes seconds, and only warns (``.ci/run`` takes it).

1. A *yardstick* is timed: what the bare loop does with a record, by the same libraries, on the same bytes.
2. Each stage of the service is timed, and divided by it: a slower machine, or one that others use, makes both dearer.
3. A ratio above :data:`TOLERANCE` times the one in ``fixtures/stage_ratios.json`` gives a line ``warning: …``. It is a
   question, not a failure: libraries and Python releases move ratios as well. ``--record`` writes the present ones.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
from fastavro import parse_schema, schemaless_reader, schemaless_writer

from consumer.avro_schemas import schema_text
from consumer.bench import plain_response, time_stages
from consumer.codec import encode_operation
from consumer.ids import ObjectContext
from consumer.operations import DEFAULT_METADATA, Insert

RATIOS = Path(__file__).parent / "fixtures" / "stage_ratios.json"
TOLERANCE = 1.5
"""Between two runs on a busy machine ratios were seen to differ by up to a quarter."""
ROUNDS = 3
"""The best of so many counts, for yardstick and stages alike: the rest is what the machine did besides."""
PAYLOAD_BYTES = 1024
RECORDS = 5_000


def yardstick() -> float:
    """Return the CPU microseconds that reading one operation and writing one response takes without the service."""
    reading: Any = parse_schema(orjson.loads(schema_text("operation")))
    writing: Any = parse_schema(orjson.loads(schema_text("response")))
    value = encode_operation(Insert(ObjectContext("bench"), "key", DEFAULT_METADATA, os.urandom(PAYLOAD_BYTES)))
    gc.collect()
    began = time.process_time()
    for offset in range(RECORDS):
        operation: Any = schemaless_reader(BytesIO(value), reading, None)
        schemaless_writer(BytesIO(), writing, plain_response(operation, "operations", 0, offset))
    return (time.process_time() - began) / RECORDS * 1e6


def measure() -> dict[str, float]:
    """Return each stage's cost over the yardstick's."""
    costs: dict[str, float] = {}
    bare = float("inf")
    for _ in range(ROUNDS):
        bare = min(bare, yardstick())
        for stage, cost in asyncio.run(time_stages(PAYLOAD_BYTES)).items():
            costs[stage] = min(cost, costs.get(stage, cost))
    return {stage: round(cost / bare, 3) for stage, cost in costs.items()}


def compare(found: Mapping[str, float], recorded: Mapping[str, float]) -> list[str]:
    """Return a line for each stage, and begin those with ``warning:`` that say something new (pure)."""
    lines = []
    for stage, ratio in found.items():
        before = recorded.get(stage)
        if before is None:
            lines.append(f"warning: {stage}: {ratio:.2f} x the yardstick, and nothing is recorded of it")
        elif ratio > before * TOLERANCE:
            lines.append(f"warning: {stage}: {ratio:.2f} x the yardstick, and was {before:.2f} x when it was recorded")
        else:
            lines.append(f"{stage}: {ratio:.2f} x the yardstick (recorded: {before:.2f} x)")
    lines += [f"warning: {stage}: is recorded, and was not measured" for stage in recorded if stage not in found]
    return lines


def main() -> None:
    """Measure, and compare or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="keep the ratios that are found, to be compared with")
    found = measure()
    if parser.parse_args().record:
        RATIOS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(compare(found, json.loads(RATIOS.read_text(encoding="utf-8")))) + "\n")


if __name__ == "__main__":
    main()
