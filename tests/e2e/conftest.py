"""Fixtures of the end-to-end suite: stages, all put down after the test, their logs shown where it failed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtable_emulator import Emulator
from brokers import Broker, apache_source, tail
from clouds import Clouds
from gcs_servers import NewBucket
from proxy import Proxy, proxied_broker
from stages import RESPONSE_BYTES, SetStage, Stage, set_up


@pytest.fixture(scope="session")
def clouds(bigtable_emulator: Emulator, fake_gcs: NewBucket) -> Clouds:
    """Storage that needs no disk: rows and change log in Bigtable's emulator, payloads in fake-gcs-server."""
    return Clouds(bigtable_emulator, fake_gcs)


@pytest.fixture(scope="session")
def storage_of_the_run(request: pytest.FixtureRequest) -> Callable[[], dict[str, Any]]:
    """A maker of the storage that stages of this run have, unless told otherwise: ``TIERSTREAM_TEST_STORAGE``."""
    match os.environ.get("TIERSTREAM_TEST_STORAGE", "sqlite"):
        case "sqlite":
            return dict
        case "bigtable":
            emulator: Emulator = request.getfixturevalue("bigtable_emulator")
            return lambda: {"storage": emulator.storage()}
        case "bigtable+gcs":
            clouds: Clouds = request.getfixturevalue("clouds")
            return lambda: {"storage": clouds.storage()}
        case unknown:
            pytest.exit(f"TIERSTREAM_TEST_STORAGE is sqlite, bigtable or bigtable+gcs, not {unknown}", 4)


@pytest.fixture
def set_stage(
    tmp_path: Path, request: pytest.FixtureRequest, storage_of_the_run: Callable[[], dict[str, Any]]
) -> Iterator[SetStage]:
    """A maker of stages: ``set_stage(broker, partitions=4, output_partitions=4, SECTION={…})``."""
    stages: list[Stage] = []

    def make(broker: Broker, partitions: int = 2, output_partitions: int | None = None, **sections: Any) -> Stage:
        folder = tmp_path / f"stage{len(stages)}"
        folder.mkdir()
        for name, section in storage_of_the_run().items():
            sections[name] = section | sections.get(name, {})
        stage = set_up(broker, folder, partitions, output_partitions or partitions, **sections)
        stages.append(stage)
        return stage

    yield make
    for stage in stages:
        stage.put_down()
        _show_logs(request, stage)


@pytest.fixture(scope="session")
def _standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    stages: dict[str, Stage] = {}
    yield stages
    for stage in stages.values():
        stage.put_down()


@pytest.fixture
def stage(
    broker: Broker,
    _standing: dict[str, Stage],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    storage_of_the_run: Callable[[], dict[str, Any]],
) -> Iterator[Stage]:
    """A running service with the suite's usual configuration, shared by all tests that only send and receive.

    Two partitions; payload references allowed below ``stage.folder/"uploads"``, none given in responses.
    """
    known = _standing.get(broker.kind)
    if known is None or known.processes[-1].process.poll() is not None:
        folder = tmp_path_factory.mktemp(f"standing-{broker.kind}")
        (folder / "uploads").mkdir()
        known = set_up(
            broker,
            folder,
            2,
            2,
            limits={"response_bytes": RESPONSE_BYTES, "record_bytes": "800KB", "object_bytes": "8MiB"},
            references={"allowed_prefixes": [(folder / "uploads").as_uri() + "/"], "in_responses": "never"},
            **storage_of_the_run(),
        )
        _standing[broker.kind] = known
        known.start(partitions=2)
    yield known
    _show_logs(request, known)
    assert known.processes[-1].process.poll() is None, known.processes[-1].obituary()


@pytest.fixture(scope="session")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Broker, Proxy]]:
    """Apache Kafka, of its own, and the proxy before its second listener; its first one is reached directly."""
    if apache_source() != "maven":
        pytest.skip("needs an Apache Kafka with settings of its own: java and mvn")
    with proxied_broker(tmp_path_factory.mktemp("proxied")) as both:
        yield both


def _show_logs(request: pytest.FixtureRequest, stage: Stage) -> None:
    """Print the end of each service log into the captured output, which pytest shows for a failing test."""
    print(f"--- {request.node.name} on {stage.broker.label}")
    for service in stage.processes:
        print(f"--- {service.log.name}, exit {service.process.poll()}\n{tail(service.log, 25)}")
