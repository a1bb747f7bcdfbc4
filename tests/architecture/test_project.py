"""The project as it is delivered: locks that name no registry, and a wheel that works away from its checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "requirements-demo.lock", "requirements-cloud.lock", "requirements-dev.lock")


def pinned(lock: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Read a lock file: package name to (pinned version with its marker, hashes)."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / lock).read_text(encoding="utf-8")):
        requirement, *hashes = entry.replace("\\\n", "").split("--hash=")
        name, _, version = requirement.strip().partition("==")
        found[name] = (version, frozenset(text.strip() for text in hashes))
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_is_pinned_by_version_and_hash(lock: str) -> None:
    """Nothing that is installed can change without this file changing."""
    packages = pinned(lock)

    assert len(packages) > 20
    assert all(version and hashes for version, hashes in packages.values())


@pytest.mark.parametrize("lock", [*LOCKS, "requirements-build.lock"])
def test_a_lock_names_no_address_and_no_place(lock: str) -> None:
    """A lock file is read on machines with other registries, mirrors and folders."""
    pin, digest = r"[a-z0-9.-]+==[^@/:]+ \\", r"    --hash=sha256:[0-9a-f]{64}( \\)?"
    lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()

    assert [line for line in lines if not re.fullmatch(f"{pin}|{digest}", line)] == []


def test_each_lock_contains_the_smaller_one_unchanged() -> None:
    """`make demo` then `make test` in one environment installs on top and replaces nothing."""
    runtime, demo, cloud, dev = (pinned(lock) for lock in LOCKS)

    assert runtime.items() <= demo.items() <= dev.items()
    assert runtime.items() <= cloud.items() <= dev.items()
    assert pinned("requirements-build.lock").items() <= dev.items()


@pytest.mark.process
def test_pytest_starts_in_this_environment_with_any_configuration(tmp_path: Path) -> None:
    """Plugins that come with the packages load by themselves, so none may lack what it needs."""
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n", encoding="utf-8")

    assert "1 passed" in run(sys.executable, "-m", "pytest", "-c", "/dev/null", tmp_path, cwd=tmp_path)


def test_python_versions_agree_everywhere() -> None:
    """Floor, classifiers and CI matrix are one statement made in three places."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    matrix = re.search(r"python: \[(.+)\]", (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    versions = [text.rpartition(" ")[2] for text in project["classifiers"] if re.search(r":: 3\.\d+$", text)]

    assert project["requires-python"] == f">={versions[0]}"
    assert matrix
    assert re.findall(r"[\d.]+", matrix[1]) == versions


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run *command* in *cwd* with nothing of this project on its path; return its stdout, fail with what it said."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TIERSTREAM_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel once."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (built,) = folder.glob("*-py3-none-any.whl")  # nothing is compiled that was not asked for
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, without dependencies, into an environment of its own; return the environment."""
    environment = tmp_path_factory.mktemp("installed")
    venv.create(environment, with_pip=False, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin/python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=environment)
    return environment


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_wheel_ships_the_schemas_byte_for_byte_and_its_type_marker(installed: Path) -> None:
    """Contract 1: the .avsc files ship in the wheel as package data, with py.typed."""
    (package,) = installed.glob("lib/python*/site-packages/consumer")

    shipped = {path.name: path.read_bytes() for path in (package / "schemas").glob("*.avsc")}
    assert shipped == {path.name: path.read_bytes() for path in (ROOT / "schemas").glob("*.avsc")}
    assert {"operation.avsc", "response.avsc"} <= shipped.keys()
    assert (package / "py.typed").is_file()
    assert not list(package.parent.glob("tests*"))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_installed_command_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Contract 1, 7: the console script runs, and reads the schemas it came with, where no checkout is near."""
    # The dependencies are lent by the environment of this test; the package can only be the installed one.
    dependencies = sysconfig.get_paths()["purelib"]

    said = run(installed / "bin/tierstream", "version", cwd=tmp_path, PYTHONPATH=dependencies)
    program = "import consumer.codec; print(consumer.__file__)"
    where = run(installed / "bin/python", "-c", program, cwd=tmp_path, PYTHONPATH=dependencies)

    assert "0.1.0" in said
    assert Path(where.strip()).is_relative_to(installed)


@pytest.mark.process
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_interpreter_that_is_asked_for_is_the_one_that_is_used(tmp_path: Path) -> None:
    """`make PYTHON=…` builds the environment again where it was made with another one, and only there."""
    for name in ("Makefile", "pyproject.toml", "requirements-demo.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / ".venv/.demo-ready").touch()
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho another one\n", encoding="utf-8")
    other.chmod(0o755)

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}

    def is_ready(*arguments: str) -> bool:
        command = ["make", "-q", ".venv/.demo-ready", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == 0

    assert is_ready()
    assert is_ready(f"PYTHON={sys.executable}")
    assert not is_ready(f"PYTHON={other}")
