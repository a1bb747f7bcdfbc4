"""The Grafana dashboard, told as rows of panels; ``make docs`` writes it as JSON.

What is written here is what differs between panels: title, unit, what it asks Prometheus, and what a reader should do
about it. Size and place follow from the order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

SELECT = 'namespace=~"$namespace", job=~"$job"'
"""What every query is limited to; Grafana puts the chosen values in."""

COLUMNS = 24
HEIGHT = 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: its title, what it says to its reader, and its queries with their legends."""

    title: str
    text: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: Literal["timeseries", "bargauge", "stat"] = "timeseries"
    width: int = 8
    maximum: float | None = None
    thresholds: tuple[tuple[float | None, str], ...] = ((None, "green"),)


def of(metric: str, *more: str) -> str:
    """Return a selector of *metric*, limited as chosen, and further."""
    return f"{metric}{{{', '.join([SELECT, *more])}}}"


def rate(metric: str, *more: str) -> str:
    """Return how fast a counter grows."""
    return f"rate({of(metric, *more)}[$__rate_interval])"


def quantile(share: float, metric: str, *by: str) -> str:
    """Return a percentile of a histogram."""
    return f"histogram_quantile({share}, sum by ({', '.join([*by, 'le'])}) ({rate(metric + '_bucket')}))"


PARTITION = "{{topic}}/{{partition}}"
AT_CAPACITY = 'reason="at_capacity"'
FAILED = 'outcome="error"'
REQUEST = "tierstream_storage_request_duration_seconds"
_FULL = ((None, "green"), (0.8, "orange"), (0.95, "red"))

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Windows",
        (
            Panel(
                "Window usage by partition",
                "In flight divided by permits. Near 100 % while lag grows: slow storage, or too small a window.",
                ((f"max by (topic, partition) ({of('tierstream_window_utilization_ratio')})", PARTITION),),
                unit="percentunit",
                kind="bargauge",
                width=12,
                maximum=1,
                thresholds=_FULL,
            ),
            Panel(
                "Permits reserved and in flight by partition",
                "The window of each partition, and the operations that run in it now.",
                (
                    (f"max by (topic, partition) ({of('tierstream_window_permits')})", f"reserved {PARTITION}"),
                    (f"max by (topic, partition) ({of('tierstream_window_in_flight')})", f"in flight {PARTITION}"),
                ),
                width=12,
            ),
            Panel(
                "Permits of all processes",
                "Reserved permits are held whether they are used or not; available ones go to the next partition.",
                (
                    (f"sum({of('tierstream_concurrency_limit')})", "limit"),
                    (f"sum({of('tierstream_concurrency_in_use')})", "reserved"),
                    (f"sum({of('tierstream_window_in_flight')})", "in flight"),
                    (f"sum({of('tierstream_concurrency_available')})", "available"),
                ),
            ),
            Panel(
                "Partitions at capacity",
                "Partitions that wait for permits. Above 0: raise concurrency.limit, or add processes.",
                ((f"sum({of('tierstream_partition_paused', AT_CAPACITY)})", "waiting for permits"),),
            ),
            Panel(
                "Reservations",
                "Windows granted and refused.",
                ((f"sum by (outcome) ({rate('tierstream_window_reservations_total')})", "{{outcome}}"),),
                unit="ops",
            ),
        ),
    ),
    (
        "Flow",
        (
            Panel(
                "Records and responses",
                "Records read and responses acknowledged; the two lines lie on each other.",
                (
                    (f"sum by (result) ({rate('tierstream_records_total')})", "{{result}}"),
                    (f"sum({rate('tierstream_responses_total')})", "responses"),
                ),
                unit="ops",
            ),
            Panel(
                "Lag by partition",
                "Records not finished. One partition alone: `tierstream why`. All: add processes.",
                ((f"max by (topic, partition) ({of('tierstream_partition_lag')})", PARTITION),),
            ),
            Panel(
                "Response latency",
                "From the record's timestamp to its acknowledged response; the time it lay in Kafka is part of it.",
                tuple(
                    (quantile(share, "tierstream_response_latency_seconds"), f"p{round(share * 100)}")
                    for share in (0.5, 0.95, 0.99)
                ),
                unit="s",
            ),
            Panel(
                "Operations by kind, p99",
                "From start to outcome, retries included.",
                ((quantile(0.99, "tierstream_operation_duration_seconds", "kind"), "{{kind}}"),),
                unit="s",
            ),
            Panel(
                "Responses by status",
                "4xx is the producers' side, 5xx is ours or the storage's.",
                ((f"sum by (status) ({rate('tierstream_responses_total')})", "{{status}}"),),
                unit="ops",
            ),
            Panel(
                "Poison by code",
                "Records that never became an operation; they are in the dead letter topic.",
                ((f"sum by (code) ({rate('tierstream_poison_records_total')})", "{{code}}"),),
                unit="ops",
            ),
        ),
    ),
    (
        "Offsets",
        (
            Panel(
                "Oldest in flight by partition",
                "Minutes here: storage does not answer. `tierstream why` names the operation.",
                ((f"max by (topic, partition) ({of('tierstream_partition_oldest_in_flight_seconds')})", PARTITION),),
                unit="s",
            ),
            Panel(
                "Finished above the gap",
                "What one unfinished record holds back; it stands in the offset map, and no restart repeats it.",
                ((f"max by (topic, partition) ({of('tierstream_partition_finished_above_gap')})", PARTITION),),
            ),
            Panel(
                "Offset map",
                "Size of the map in the last commit; brokers take 4,096 characters unless told otherwise.",
                ((f"max by (topic, partition) ({of('tierstream_partition_offset_map_bytes')})", PARTITION),),
                unit="bytes",
            ),
            Panel(
                "Since the last commit",
                "Old while lag is there: the coordinator does not answer, or one record is stuck.",
                (
                    (
                        ("max by (topic, partition) "
                        f"(time() - {of('tierstream_partition_last_commit_timestamp_seconds')})"),
                        PARTITION,
                    ),
                ),
                unit="s",
            ),
            Panel(
                "Paused",
                "Why partitions read nothing now; the reason names the part to look at.",
                ((f"sum by (reason) ({of('tierstream_partition_paused')})", "{{reason}}"),),
            ),
            Panel(
                "Rebalances",
                "Partitions given up. timeout: expect duplicates; lost: we were expelled.",
                ((f"sum by (outcome) ({rate('tierstream_rebalances_total')})", "{{outcome}}"),),
                unit="ops",
            ),
        ),
    ),
    (
        "Storage",
        (
            Panel(
                "Requests by tier, p99",
                "One request each, without retries.",
                ((quantile(0.99, REQUEST, "tier", "operation"), "{{tier}} {{operation}}"),),
                unit="s",
            ),
            Panel(
                "Failed requests by tier",
                "They are tried again before anything is answered.",
                (
                    (
                        ("sum by (tier, operation) "
                        f"({rate('tierstream_storage_request_duration_seconds_count', FAILED)})"),
                        "{{tier}} {{operation}}",
                    ),
                ),
                unit="ops",
            ),
            Panel(
                "Bytes by tier",
                "Payload read and written.",
                ((f"sum by (tier, direction) ({rate('tierstream_storage_bytes_total')})", "{{tier}} {{direction}}"),),
                unit="Bps",
            ),
            Panel(
                "Change log",
                "Changes across both tiers not cleaned up. Growing without end: deletes in the long-term tier fail.",
                ((f"sum({of('tierstream_change_log_entries')})", "entries"),),
            ),
            Panel(
                "In-flight bytes",
                "Charged to limits.in_flight_bytes.",
                ((f"sum by (pod) ({of('tierstream_in_flight_bytes')})", "{{pod}}"),),
                unit="bytes",
            ),
            Panel(
                "Event loop lag",
                "Above 1 s something blocks, or CPU is short.",
                ((f"max by (pod) ({of('tierstream_event_loop_lag_seconds')})", "{{pod}}"),),
                unit="s",
            ),
        ),
    ),
)


def dashboard() -> str:
    """Return the dashboard as Grafana imports it."""
    variables = [
        {
            "name": name,
            "type": "query",
            "label": name,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": f"label_values(tierstream_build_info, {name})", "refId": name},
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
            "allValue": ".*",
            "refresh": 2,
        }
        for name in ("namespace", "job")
    ]
    made = {
        "title": "tierstream",
        "uid": "tierstream",
        "tags": ["tierstream", "kafka"],
        "schemaVersion": 39,
        "editable": True,
        "timezone": "",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "label": "data source", "query": "prometheus", "hide": 0},
                *variables,
            ]
        },
        "panels": list(_panels()),
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _panels() -> Iterator[dict[str, Any]]:
    ids = count(1)
    y = 0
    for title, panels in ROWS:
        yield {
            "id": next(ids),
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
        }
        y += 1
        x = 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + HEIGHT
            yield _panel(panel, next(ids)) | {"gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHT}}
            x += panel.width
        y += HEIGHT


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": color} for value, color in panel.thresholds],
        },
    }
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "bargauge":
        options = {"orientation": "horizontal", "displayMode": "gradient", "reduceOptions": {"calcs": ["lastNotNull"]}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + place), "expr": expression, "legendFormat": legend}
            | ({"exemplar": True} if "_bucket" in expression else {})
            for place, (expression, legend) in enumerate(panel.queries)
        ],
    }
