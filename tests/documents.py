"""Documents that are made from the code, so that they cannot fall behind it; ``make docs`` writes them.

* ``docs/metrics.md``: the catalogue of metrics, each with what to do about it;
* ``helm/tierstream/values.schema.json``: the part about ``config`` is the service's own schema, without its secrets,
  as those do not belong into a ConfigMap;
* ``helm/tierstream/dashboards/tierstream.json``: the dashboard of ``dashboards.py``;
* ``helm/tierstream/README.md``: the table of values, from the comments of ``values.yaml`` that begin with ``--``.

``tests/architecture/test_documents.py`` fails where a file is not what would be written.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from consumer.config import json_schema
from consumer.metrics import CATALOGUE
from dashboards import dashboard

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "tierstream"

SECRETS = ("sasl_password", "ssl_key_password", "password", "bearer_token", "client_secret")
"""Settings that come from secret files or the environment."""


def metrics_page() -> str:
    """Return ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Served at `/metrics` of the admin port, as Prometheus text or OpenMetrics. Names and labels are public;",
        "labels are bounded and never hold an object key. Series of a partition are there while it is assigned.",
        "",
        "Made from the declarations in `consumer/metrics.py` by `make docs`.",
        "",
        "| metric | type | labels | what it says, and what to do about it |",
        "| --- | --- | --- | --- |",
    ]
    for definition in CATALOGUE.values():
        labels = ", ".join(f"`{label}`" for label in definition.labels) or "none"
        lines.append(f"| `{definition.name}` | {definition.kind} | {labels} | {definition.text} |")
    return "\n".join(lines) + "\n"


def values_schema() -> str:
    """Return ``values.schema.json``: what is written there, with the service's schema of today."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    ours = json_schema()
    definitions = ours.pop("$defs")
    del ours["$schema"]
    ours["required"] = ["kafka"]
    schema["$defs"] = {"config": _without_secrets(ours)} | {
        name: _without_secrets(definition) for name, definition in sorted(definitions.items())
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _without_secrets(model: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in model["properties"].items() if name not in SECRETS}
    required = [name for name in model.get("required", ()) if name in kept]
    rest = {name: value for name, value in model.items() if name not in {"properties", "required"}}
    return rest | {"properties": kept} | ({"required": required} if required else {})


def values_table() -> str:
    """Return the chart's README: the table of values between its two marks is made anew."""
    rows = ["| value | default | |", "| --- | --- | --- |"]
    path: list[tuple[int, str]] = []
    said: list[str] = []
    lines = (CHART / "values.yaml").read_text(encoding="utf-8").splitlines()
    values = yaml.safe_load("\n".join(lines))
    for line in lines:
        comment = re.match(r"\s*# (-- )?(.*)", line)
        if comment:
            if comment[1]:
                said = [comment[2]]
            elif said:
                said.append(comment[2])
            continue
        entry = re.match(r"(\s*)([A-Za-z]+):", line)
        if entry is None:
            said = []
            continue
        depth = len(entry[1])
        path = [(level, name) for level, name in path if level < depth] + [(depth, entry[2])]
        if said:
            name = ".".join(part for _, part in path)
            value: Any = values
            for part in name.split("."):
                value = value[part]
            default = "see `values.yaml`" if name == "config" else f"`{json.dumps(value)}`"
            rows.append(f"| `{name}` | {default} | {' '.join(said)} |")
        said = []
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split("<!-- values: begin -->")
    after = rest.split("<!-- values: end -->")[1]
    table = "\n".join(rows)
    return f"{before}<!-- values: begin -->\n{table}\n<!-- values: end -->{after}"


DOCUMENTS = {
    ROOT / "docs" / "metrics.md": metrics_page,
    CHART / "values.schema.json": values_schema,
    CHART / "README.md": values_table,
    CHART / "dashboards" / "tierstream.json": dashboard,
}
"""What is made, and by what."""

if __name__ == "__main__":
    for place, make in DOCUMENTS.items():
        place.write_text(make(), encoding="utf-8")
        print(f"written: {place.relative_to(ROOT)}")  # noqa: T201 - it is a command
