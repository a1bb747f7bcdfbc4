"""The compiled wheel: made where it is asked for, complete, and held to the tests of what is compiled in it.

Needs a C compiler and the headers of Python. Where they are missing its tests are skipped with the reason, or fail if
``TIERSTREAM_REQUIRE_COMPILER=1`` says that they have to be there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("codec", "prescan")

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(300)]

PROVING = (
    "tests/unit/test_codec.py",
    "tests/unit/test_prescan.py",
    "tests/unit/test_schemas.py",
    "tests/unit/test_assignment.py",
    "tests/properties/test_codec_agreement.py",
    "tests/properties/test_codec_hostile.py",
)
"""Tests of the compiled modules, and of who uses them for every record."""


def missing() -> str | None:
    """Tell what this machine lacks."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        return f"no C compiler: there is no {compiler}"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return None if headers.exists() else f"no headers of Python: there is no {headers}"


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask for a compiled wheel."""
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        env=os.environ | {"TIERSTREAM_COMPILE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel once."""
    if (lack := missing()) is not None:
        if os.environ.get("TIERSTREAM_REQUIRE_COMPILER") == "1":
            pytest.fail(f"{lack}, and TIERSTREAM_REQUIRE_COMPILER=1", pytrace=False)
        pytest.skip(lack)
    folder = tmp_path_factory.mktemp("compiled")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel installs."""
    folder = tmp_path_factory.mktemp("unpacked")
    with ZipFile(wheel) as content:
        content.extractall(folder)
    return folder


def run_with(unpacked: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the package in *unpacked*, whatever else is installed."""
    first = f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
    return subprocess.run(
        [sys.executable, "-P", "-c", first + program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_it_is_for_this_python_and_has_each_library_beside_its_source(wheel: Path) -> None:
    """Both: whoever reads a traceback wants the source. Nothing of how it was made comes along."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    with ZipFile(wheel) as content:
        names = set(content.namelist())

    libraries = {f"consumer/{module}{suffix}" for module in MODULES} | {f"tierstream__mypyc{suffix}"}
    assert {name for name in names if name.endswith((".so", ".pyd", ".c", ".h"))} == libraries
    assert {f"consumer/{module}.py" for module in MODULES} <= names
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
    assert not list(ROOT.glob("consumer/**/*.so")), "beside the sources of a checkout one could be older than they are"


def test_what_is_imported_is_the_library_and_the_version_says_so(unpacked: Path) -> None:
    """Whoever measures has to know which one it was."""
    program = f"import importlib\nfor one in {MODULES}: print(importlib.import_module('consumer.' + one).__file__)"
    said = run_with(unpacked, program)
    version = run_with(unpacked, "from consumer.cli import main\nmain()", "version", "--json")

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert said.stdout.split() == [str(unpacked / "consumer" / f"{module}{suffix}") for module in MODULES], said.stderr
    assert json.loads(version.stdout)["compiled"] is True


def test_it_keeps_what_the_sources_promise(unpacked: Path) -> None:
    """The very tests of the sources, once more."""
    program = "import consumer.codec, consumer.prescan, pytest\nsys.exit(pytest.main(sys.argv[1:]))"

    done = run_with(unpacked, program, "-q", "-p", "no:cacheprovider", *PROVING)

    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_without_a_compiler_one_is_told_so_and_gets_no_wheel(tmp_path: Path) -> None:
    """A pure wheel in its place would be slower, and nobody would know why."""
    done = build(tmp_path, CC="no-such-compiler")

    assert done.returncode != 0
    assert "needs a C compiler, and there is no no-such-compiler\nhint: " in done.stderr
    assert not list(tmp_path.iterdir())
