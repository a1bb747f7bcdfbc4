"""The image, as far as it can be checked without an engine that builds it; CI builds it and asks it for its health."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def final_stage() -> str:
    """The stage that is delivered."""
    return DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]


@pytest.mark.process
def test_hadolint_finds_nothing() -> None:
    """The rules of a linter for Dockerfiles, all of them."""
    hadolint = Path(sys.executable).with_name("hadolint")

    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    """The build has a context of just that; a file that is ignored would break it far away from here."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        name.removeprefix("./")
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for name in line.split()[:-1]
    }

    assert "*" in ignored
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_packages_are_installed_by_hash_and_nothing_else_is_fetched() -> None:
    """What runs is what was checked."""
    installs = re.findall(r"pip install ([^&\\]+)", DOCKERFILE)

    assert installs
    assert all("--require-hashes" in line or "--no-index" in line for line in installs)


def test_it_runs_as_nobody_in_particular_by_number() -> None:
    """Kubernetes can tell a number that is not 0 from root; a name it would have to look up."""
    users = re.findall(r"^USER (\S+)$", final_stage(), re.MULTILINE)

    assert users == ["65532:65532"]


def test_signals_reach_the_service() -> None:
    """A shell between would keep SIGTERM to itself: no drain, and every stop a kill."""
    stage = final_stage()

    assert re.search(r'^ENTRYPOINT \["tierstream"\]$', stage, re.MULTILINE)
    assert re.search(r'^CMD \["run"\]$', stage, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK .* CMD \["tierstream", "health"\]$', stage, re.MULTILINE)


def test_the_python_of_the_image_is_one_that_is_tested() -> None:
    """Both stages the same, from the CI matrix."""
    versions = re.findall(r"^FROM python:([\d.]+)-slim", DOCKERFILE, re.MULTILINE)
    matrix = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")

    assert len(versions) == 2
    assert len(set(versions)) == 1
    assert f'"{versions[0]}"' in matrix
