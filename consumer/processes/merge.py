"""One state and one set of metrics out of those of several processes (pure).

**State** (:func:`merged_state`), in the shape of each of them: partitions of all, sorted; permits, totals and bytes
summed; the worst of the states; the newest of the errors.

**Metrics** (:class:`Tally`), in the names and labels of each of them:

* Counters and histograms are summed over *every run of every process, also those that are over*: of each run the last
  known value is kept. Without that the sum would fall when a process dies or does not answer, and whoever computes a
  rate takes a counter that falls for one that began again at zero, and the whole rest of it for an increase.
* Of exemplars the newest is shown, of the processes that answer.
* Gauges are summed over the processes that answer, but for the few in :data:`COMBINED` whose sum says nothing.
* Series with a partition are shown while some process shows them. A counter among them is summed as above: it goes on
  where it was when its partition moves from one process to another.

A partition has one owner. Where two processes show it, one has not heard yet that it lost it; the one that has read
further is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, Final, TypeAlias

from consumer.log import LAST_ERRORS_MAX
from consumer.metrics import PlainExemplar, PlainFamily, PlainSample

COMBINED: Final[Mapping[str, Callable[[float, float], float]]] = {
    "tierstream_event_loop_lag_seconds": max,
    "tierstream_build_info": max,
    "process_start_time_seconds": min,
}
"""How gauges are combined whose sum says nothing."""

STATES: Final = ("running", "rebalancing", "starting", "draining")
"""From the best to the worst. ``stopped`` is not among them: who is stopped does not answer."""

POSITION: Final = "tierstream_partition_position"

Run: TypeAlias = tuple[int, int]
"""A process's number, and which run of it."""

Labels: TypeAlias = tuple[tuple[str, str], ...]
Series: TypeAlias = tuple[str, Labels]
Partition: TypeAlias = tuple[str, str]


# ------------------------------------------------------------------------------------------------- state


def merged_state(states: Mapping[int, Mapping[str, Any]], state: str, empty: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the states of the processes that answered.

    Args:
        states: ``/debug/state`` of each, by number.
        state: The least the merged ``state`` says, such as ``starting`` while a process does not answer.
        empty: The state of a process that does nothing: what is shown where nobody answers.
    """
    told = [states[number] for number in sorted(states)]
    worst = max([state, *(one["state"] for one in told)], key=_badness)
    owned: dict[tuple[str, int], Mapping[str, Any]] = {}
    for one in told:
        for entry in one["partitions"]:
            name = entry["topic"], entry["partition"]
            if name not in owned or _place(owned[name]["position"]) < _place(entry["position"]):
                owned[name] = entry
    merged = {
        name: combined([one.get(name) for one in [empty, *told]])
        for name in dict.fromkeys(["state", *(name for one in [*told, empty] for name in one)])
    }
    errors = [error for one in [empty, *told] for error in one.get("last_errors") or ()]
    return {
        **merged,
        "state": worst,
        "partitions": [owned[name] for name in sorted(owned)],
        "last_errors": sorted(errors, key=itemgetter("timestamp"))[-LAST_ERRORS_MAX:],
    }


def _badness(state: str) -> int:
    return STATES.index(state) if state in STATES else len(STATES)


def _place(position: float | None) -> float:
    return -1 if position is None else position


def combined(values: Iterable[Any]) -> Any:
    """Combine values of one name: numbers are summed, what is true of one is true, of texts the first. None is nothing.

    Mappings are combined name by name.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    if all(isinstance(value, Mapping) for value in known):
        names = dict.fromkeys(name for value in known for name in value)
        return {name: combined([value.get(name) for value in known]) for name in names}
    if all(isinstance(value, bool) for value in known):
        return any(known)
    if all(isinstance(value, int | float) for value in known):
        return sum(known)
    return known[0]


# ------------------------------------------------------------------------------------------------- metrics


class Tally:
    """The counters of every run of every process, and the metrics of all of them together.

    Memory: for each living run one number for each counter series it has shown; for all past runs together likewise.
    """

    def __init__(self) -> None:
        self._families: dict[str, tuple[str, str]] = {}
        """Kind and text of every family seen, in their order."""
        self._living: dict[Run, dict[Series, float]] = {}
        """By run, the last known value of each of its counters."""
        self._past: dict[Series, float] = {}
        """The same of all runs that are over, summed."""
        self._family_of: dict[str, str] = {}
        """Sample name: name of its family."""

    def ended(self, run: Run) -> None:
        """A run is over; what it has counted stays in the sums."""
        for series, value in self._living.pop(run, {}).items():
            self._past[series] = self._past.get(series, 0.0) + value

    def merged(self, told: Mapping[Run, Iterable[PlainFamily]]) -> list[PlainFamily]:
        """Take the metrics of the runs that answered, and return those of all processes."""
        gauges: dict[Series, float] = {}
        exemplars: dict[Series, PlainExemplar] = {}
        shown: set[Series] = set()
        families = {run: list(told[run]) for run in sorted(told)}
        owners = _owners(families)
        for run, of_run in families.items():
            counters = self._living.setdefault(run, {})
            for family in of_run:
                self._families.setdefault(family.name, (family.kind, family.text))
                for sample in family.samples:
                    series, value = _series(sample), sample[2]
                    self._family_of[series[0]] = family.name
                    exemplar = sample[3]
                    if exemplar is not None and (series not in exemplars or exemplars[series][2] < exemplar[2]):
                        exemplars[series] = exemplar
                    partition = _partition(series)
                    if family.kind != "gauge":
                        counters[series] = value
                        shown.add(series)
                    elif partition is None or owners.get(partition, run) == run:
                        combine = COMBINED.get(family.name)
                        if series not in gauges:
                            gauges[series] = value
                        else:
                            gauges[series] = combine(gauges[series], value) if combine else gauges[series] + value
        sums = dict(self._past)
        for counters in self._living.values():
            for series, value in counters.items():
                sums[series] = sums.get(series, 0.0) + value
        merged: dict[str, list[PlainSample]] = {name: [] for name in self._families}
        for series, value in [*gauges.items(), *sums.items()]:
            if series in gauges or series in shown or _partition(series) is None:
                merged[self._family_of[series[0]]].append(
                    (series[0], dict(series[1]), value, exemplars.get(series))
                )
        return [PlainFamily(name, *self._families[name], samples) for name, samples in merged.items()]


def _series(sample: PlainSample) -> Series:
    return sample[0], tuple(sample[1].items())


def _partition(series: Series) -> Partition | None:
    labels = dict(series[1])
    return (labels["topic"], labels["partition"]) if "partition" in labels else None


def _owners(families: Mapping[Run, Iterable[PlainFamily]]) -> dict[Partition, Run]:
    """Tell which run to believe about each partition: the one that has read further."""
    furthest: dict[Partition, tuple[float, Run]] = {}
    for run, of_run in families.items():
        for family in of_run:
            if family.name != POSITION:
                continue
            for sample in family.samples:
                partition = _partition(_series(sample))
                if partition is not None and (partition not in furthest or furthest[partition][0] < sample[2]):
                    furthest[partition] = sample[2], run
    return {partition: run for partition, (_, run) in furthest.items()}
