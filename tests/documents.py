"""Documents that are made from the code, so that they cannot fall behind it; ``make docs`` writes them.

* ``docs/metrics.md``: the catalogue of metrics, each with what to do about it;
* ``docs/configuration.md``: every setting, from the declarations in ``consumer/config.py``;
* ``docs/commands.md``: every command with its arguments and options, from their declarations in ``consumer/cli``;
* ``helm/tierstream/values.schema.json``: the part about ``config`` is the service's own schema, without its secrets,
  as those do not belong into a ConfigMap;
* ``docs/dashboard.md``: what each panel of the dashboard shows, and which metrics it asks for;
* ``helm/tierstream/dashboards/tierstream.json``: the dashboard of ``dashboards.py``;
* ``helm/tierstream/README.md``: the table of values, from the comments of ``values.yaml`` that begin with ``--``.

``tests/architecture/test_documents.py`` fails where a file is not what would be written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from consumer.cli import app
from consumer.config import json_schema
from consumer.metrics import CATALOGUE
from dashboards import ROWS, dashboard

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "tierstream"

SECRETS = ("sasl_password", "ssl_key_password", "password", "bearer_token", "client_secret")
"""Settings that come from secret files or the environment."""

CONFIGURATION_HEAD = """\
# Configuration

One YAML file (`--config FILE`, or `TIERSTREAM_CONFIG`), environment variables and secret files. The command line wins
over the environment, that over secret files, those over the YAML, and that over the defaults. A setting `section.name`
is the variable `TIERSTREAM_SECTION__NAME` (lists with commas) and the secret file `section__name` in
`TIERSTREAM_SECRETS_DIR` (`/run/secrets/tierstream`). `tierstream config show --origin` tells what applies and where it
comes from; `tierstream check-config` names all mistakes at once.

Durations are `250ms`, `30s`, `5m`, sizes `64MiB`, `1MB` or bytes. Required is only what has no default.

Made from the declarations in `consumer/config.py` by `make docs`. The same as JSON Schema, for editors:
`tierstream config schema`.
"""

COMMANDS_HEAD = """\
# Commands

Data goes to stdout, everything else to stderr: `error: …`, then `hint: …` where something can be done. `--json` has the
whole answer for programs; nothing that goes into a pipe has colours, and `NO_COLOR` leaves them out on a terminal as
well. What changes something asks first; `--yes` answers, `--dry-run` only says what would be done. Exit codes: 0 done ·
1 failed, or the answer is no · 2 wrong usage or configuration · 130 interrupted; those of `run` stand in the
[README](../README.md#operate-it). `tierstream --install-completion` teaches the shell the names.

Made from the declarations in `consumer/cli` by `make docs`.
"""


def metrics_page() -> str:
    """Return ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Served at `/metrics` of the admin port, as Prometheus text or OpenMetrics. Names and labels are public;",
        "labels are bounded and never hold an object key. Series of a partition are there while it is assigned.",
        "",
        "As OpenMetrics, the buckets of `tierstream_response_latency_seconds`, `tierstream_operation_duration_seconds`",
        "and `tierstream_storage_request_duration_seconds` carry exemplars: topic, partition and offset of a record",
        "that was so slow, and its `trace_id` where it is traced, here or by its producer (`traceparent`).",
        "`tierstream inspect` shows that record. Requests that are no record's (clean-up, recovery), and those that",
        "wait for nothing, have none.",
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


def dashboard_page() -> str:
    """Return ``docs/dashboard.md``."""
    lines = [
        "# The dashboard",
        "",
        "[One Grafana dashboard](../helm/tierstream/dashboards/tierstream.json), the same for every way of running it:",
        "the Helm chart brings it (`dashboards.enabled`), [compose](compose.yaml) provisions it, Grafana imports the",
        "file. Choose a data source, namespaces and jobs at the top. The first row is the headline: how full the",
        "windows are.",
        "",
        "![All panels of the dashboard, with the data of a real run](dashboard.png)",
        "",
        "The data is Prometheus' own, of a service under load (`make picture`); the drawing is not Grafana's.",
        "",
        "Made from the panels' declarations by `make docs`; tests hold every query against a running service.",
    ]
    for title, panels in ROWS:
        lines += ["", f"## {title}", "", "| panel | what it says, and what to do about it | metrics |"]
        lines.append("| --- | --- | --- |")
        for panel in panels:
            asked = " ".join(query for query, _ in panel.queries)
            names = sorted({re.sub("_(bucket|count|sum)$", "", name) for name in re.findall(r"tierstream_\w+", asked)})
            lines.append(f"| {panel.title} | {panel.text} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """Return ``docs/configuration.md``."""
    schema = json_schema()
    models: dict[str, Any] = schema["$defs"]
    lines = [*CONFIGURATION_HEAD.splitlines(), ""]
    single = []
    for name, setting in schema["properties"].items():
        model = models.get(setting.get("$ref", "").rpartition("/")[2])
        if model is None:
            single.append(_setting_row(name, setting, models, name))
            continue
        lines += [f"## `{name}`", "", model["description"], "", *_SETTINGS_HEAD]
        chosen = []
        for inner, of in model["properties"].items():
            lines.append(_setting_row(f"{name}.{inner}", of, models, inner))
            chosen += [(f"{name}.{inner}", models[one["$ref"].rpartition("/")[2]]) for one in of.get("oneOf", ())]
        for path, tier in chosen:
            kind = tier["properties"]["type"]["const"]
            lines += ["", f"### `{path}` of type `{kind}`", "", tier["description"], "", *_SETTINGS_HEAD]
            lines += [_setting_row(f"{path}.{one}", of, models, one) for one, of in tier["properties"].items()]
        lines.append("")
    lines += ["## Settings of no section", "", *_SETTINGS_HEAD, *single, "", "## `usecases.NAME`", ""]
    usecase = models["Usecase"]
    lines += [usecase["description"], "", *_SETTINGS_HEAD]
    lines += [_setting_row(f"usecases.NAME.{one}", of, models, one) for one, of in usecase["properties"].items()]
    return "\n".join(lines) + "\n"


_SETTINGS_HEAD = ["| setting | default | takes | what it does |", "| --- | --- | --- | --- |"]


def _setting_row(path: str, setting: dict[str, Any], models: dict[str, Any], name: str) -> str:
    default = "required"
    if "default" in setting:
        value = setting["default"]
        default = f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"
    if name in SECRETS:
        default = "a secret"
    text = setting.get("description", "").replace("|", "\\|").replace("\n", " ")
    return f"| `{path}` | {default} | {_takes(setting, models)} | {text} |"


def _takes(setting: dict[str, Any], models: dict[str, Any]) -> str:
    """Say in words what values a part of a schema allows."""
    if "enum" in setting:
        return " \\| ".join(f"`{value}`" for value in setting["enum"])
    if "const" in setting:
        return f"`{setting['const']}`"
    if "$ref" in setting:
        members = models[setting["$ref"].rpartition("/")[2]]["properties"]
        return "a mapping: " + ", ".join(f"`{name}`" for name in members)
    if "oneOf" in setting:
        return "by its `type`, below"
    kinds = [part for part in setting.get("anyOf", []) if part.get("type") != "null"]
    if kinds:
        words = list(dict.fromkeys(_takes(kind, models) for kind in kinds))
        return " or ".join(words) + (", or `null`" if len(kinds) < len(setting["anyOf"]) else "")
    kind = setting.get("type", "")
    if isinstance(kind, list):
        if "pattern" not in setting:
            return _takes(setting | {"type": "number"}, models)
        return "a duration" if "ms" in setting["pattern"] else "a size"
    if kind == "array":
        return f"a list of {_takes(setting.get('items', {}), models)}"
    if kind in {"integer", "number"}:
        least, most = setting.get("minimum"), setting.get("maximum")
        above = setting.get("exclusiveMinimum")
        bounds = [f"above {above:g}"] if above is not None else []
        bounds += [f"from {least:g}"] if least is not None else []
        bounds += [f"to {most:g}"] if most is not None else []
        return " ".join(["a number", *bounds])
    return {"boolean": "`true` or `false`", "string": "a text", "object": "a mapping"}.get(kind, str(kind))


def commands_page() -> str:
    """Return ``docs/commands.md``."""
    lines: list[str] = [*COMMANDS_HEAD.splitlines(), ""]
    for words, command in _commands(typer.main.get_command(app)):
        name = " ".join(words)
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        usage = " ".join([f"tierstream {name}", *(one.metavar for one in arguments)])
        text: str = re.sub(r"(?m)^ +", "", command.help or "").strip()
        lines += [f"## `{name}`", "", text, "", f"`{usage}`", ""]
        rows = [_option_row(one) for one in command.params if one.name != "help"]
        if rows:
            lines += ["| | |", "| --- | --- |", *rows, ""]
    return "\n".join(lines[:-1]) + "\n"


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _option_row(option: Any) -> str:
    if option.param_type_name == "argument":
        called = f"`{option.metavar}`"
    else:
        value = "" if option.is_flag else f" {option.metavar}"
        called = ", ".join(f"`{name}`" for name in (*option.opts[:-1], option.opts[-1] + value))
    notes = [getattr(option, "help", None) or ""]
    if option.required:
        notes.append("Required.")
    elif option.param_type_name == "option" and not option.is_flag and option.default is not None:
        default = getattr(option.default, "value", option.default)
        notes.append(f"Default: `{default}`.")
    text = " ".join(note for note in notes if note).replace("|", "\\|")
    return f"| {called.replace('|', chr(92) + '|')} | {text} |"


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
    ROOT / "docs" / "configuration.md": configuration_page,
    ROOT / "docs" / "commands.md": commands_page,
    ROOT / "docs" / "dashboard.md": dashboard_page,
    CHART / "values.schema.json": values_schema,
    CHART / "README.md": values_table,
    CHART / "dashboards" / "tierstream.json": dashboard,
}
"""What is made, and by what."""

if __name__ == "__main__":
    for place, make in DOCUMENTS.items():
        place.write_text(make(), encoding="utf-8")
        print(f"written: {place.relative_to(ROOT)}")  # noqa: T201 - it is a command
