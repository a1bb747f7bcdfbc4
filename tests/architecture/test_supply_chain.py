"""What is shipped beside our own code: under which licences, listed in a bill of materials, built by workflows.

* Each package that users run states a licence that is on the list of those that go with Apache-2.0; a spelling nobody
  has looked at fails, as does one that is missing.
* The bill of materials (`make sbom`) names exactly what the image's lock file does.
* The workflows have no more rights than they need, run only what GitHub itself publishes, and call what there is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from shown import check_tierstream

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

ALLOWED = frozenset({"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "MPL-2.0", "PSF-2.0"})
"""May be shipped beside code under Apache-2.0, unchanged, with their texts: which the packages bring along."""

SPELLINGS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
"""How packages without an SPDX expression (PEP 639) put it. "BSD" alone would be either of the two that are allowed."""


def shipped() -> list[str]:
    """The packages of the image and of the demo that this machine has: what a user runs, and what runs it for him."""
    text = "".join((ROOT / lock).read_text(encoding="utf-8") for lock in LOCKS)
    found = [Requirement(line.rstrip(" \\")) for line in re.findall(r"^[a-z0-9].*$", text, re.MULTILINE)]
    return sorted({one.name for one in found if one.marker is None or one.marker.evaluate()})


LOCKS = ("requirements-cloud.lock", "requirements-demo.lock")


def stated(package: str) -> str:
    """What the metadata of an installed package say of its licence; the newest way of saying it first."""
    metadata = distribution(package).metadata
    classifiers = [
        text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if text.startswith("License :: ")
    ]
    said: list[str] = [*metadata.get_all("License-Expression", []), *metadata.get_all("License", [])]
    return next(text for text in [*said, " OR ".join(classifiers), "nothing"] if text)


def acceptable(expression: str) -> bool:
    """Whether an SPDX expression, or an older spelling, leaves a choice that is allowed: all of AND, one of OR."""
    if expression in SPELLINGS:
        return SPELLINGS[expression] in ALLOWED
    tokens = re.findall(r"\(|\)|[^\s()]+", expression)
    for position, token in enumerate(tokens):
        if token not in {"(", ")", "AND", "OR"}:
            tokens[position] = str(token in ALLOWED)
    # `and` binds more tightly than `or`, in SPDX as in Python; nothing is left but these words and parentheses.
    words = {"AND": "and", "OR": "or"}
    try:
        return bool(eval(" ".join(words.get(token, token) for token in tokens), {"__builtins__": {}}))
    except SyntaxError:
        return False


@pytest.mark.parametrize("package", shipped())
def test_every_package_that_is_shipped_has_a_licence_that_may_be(package: str) -> None:
    """Read from the metadata of what is installed, so that a new version with another licence is seen."""
    assert acceptable(stated(package)), f"{package}: {stated(package)!r}"


@pytest.mark.parametrize(
    ("expression", "verdict"),
    [
        ("MIT", True),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("MIT OR GPL-3.0-only AND AGPL-3.0-only", True),
        ("(MIT OR GPL-3.0-only) AND AGPL-3.0-only", False),
        ("Apache Software License", True),
        ("Proprietary", False),
        ("Some License With A Long Name", False),
        ("", False),
    ],
)
def test_what_is_not_known_is_not_allowed(expression: str, verdict: bool) -> None:
    """The judge itself."""
    assert acceptable(expression) is verdict


@pytest.mark.process
@pytest.mark.slow
def test_the_bill_of_materials_names_what_the_image_installs(tmp_path: Path) -> None:
    """By the command of the Makefile; its tool validates what it writes against CycloneDX's own schema.

    Made twice, also where packages come from another place: it says nothing of the machine that made it.
    """
    recipe = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.dev-ready", "sbom"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.replace("\\\n", " ")
    (line,) = [line for line in recipe.splitlines() if "cyclonedx-py" in line]
    program = Path(sys.executable).with_name("cyclonedx-py")
    elsewhere = "http://mirror.invalid/simple"
    makers = []
    for name, environment in (
        ("here", {}),
        ("elsewhere", {"PIP_INDEX_URL": elsewhere, "PIP_EXTRA_INDEX_URL": elsewhere}),
    ):
        (tmp_path / name).mkdir()
        arguments = line.partition("cyclonedx-py ")[2].replace("dist/", f"{tmp_path / name}/").split()
        makers.append(
            subprocess.Popen(
                [program, *arguments], cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True
            )
        )
    said = [maker.communicate(timeout=100)[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0], said
    bill = tmp_path / "here" / "tierstream.cdx.json"
    assert bill.read_bytes() == (tmp_path / "elsewhere" / bill.name).read_bytes()

    written = json.loads(bill.read_text(encoding="utf-8"))
    listed = {entry["name"]: entry["version"] for entry in written["components"]}
    lock = (ROOT / "requirements-cloud.lock").read_text(encoding="utf-8")
    pinned = {Requirement(line.rstrip(" \\")) for line in re.findall(r"^[a-z0-9].*$", lock, re.MULTILINE)}
    assert listed == {one.name: next(iter(one.specifier)).version for one in pinned}
    hashes = {
        digest["content"]
        for entry in written["components"]
        for reference in entry["externalReferences"]
        for digest in reference.get("hashes", ())
    }
    assert hashes == set(re.findall(r"sha256:([0-9a-f]{64})", lock))
    assert (written["metadata"]["component"]["name"], written["bomFormat"]) == ("tierstream", "CycloneDX")


def workflow(path: Path) -> dict[str, Any]:
    """A workflow; YAML takes its `on` for a truth value."""
    described: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {("on" if key is True else key): value for key, value in described.items()}


def steps(described: dict[str, Any]) -> list[dict[str, Any]]:
    """All steps of all jobs."""
    return [step for job in described["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_no_more_rights_than_it_needs(path: Path) -> None:
    """Read only unless a job says which more; the token does not stay in the checkout; nothing runs for ever."""
    described = workflow(path)

    assert described["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in described["on"]
    for name, job in described["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        assert path.name == "release.yml" or "permissions" not in job, name
    for step in steps(described):
        used = step.get("uses", "actions/none@v1")
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", used), f"{used} is not GitHub's own"
        if used.startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_text_from_outside_becomes_a_command(path: Path) -> None:
    """Names of branches, titles and tags reach a shell by the environment alone."""
    for step in steps(workflow(path)):
        assert "${{" not in step.get("run", ""), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_what_there_is(path: Path) -> None:
    """Targets of the Makefile, files of the repository, and shell that a shell can read."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for step in steps(workflow(path)):
        script = step.get("run", "")
        for target in re.findall(r"\bmake ([a-z-]+)", script):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for file in re.findall(r"(?:docs|helm|tests|\.ci)/[\w./-]+", script):
            assert (ROOT / file).exists(), file
        # Within a container the program is named after the container's name, and functions stand for that.
        plain = re.sub(r"docker exec tierstream |^ *\w+\(\) \{.*$", "", script, flags=re.MULTILINE)
        for line in re.findall(r"(?<![\w./:-])tierstream ([a-z][^|&;\n]*)", plain):
            check_tierstream(shlex.split(line))
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=10, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_release_is_of_one_version() -> None:
    """The condition under which the workflow goes on, carried out here: tag, package and chart agree."""
    (step,) = [
        step for step in steps(workflow(ROOT / ".github/workflows/release.yml")) if "appVersion" in step.get("run", "")
    ]
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"

    def goes_on(tag: str) -> bool:
        environment = {"GITHUB_REF_NAME": tag, "PATH": path}
        command = ["bash", "-e", "-c", step["run"]]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode == 0

    assert goes_on(f"v{version[1]}")
    assert not goes_on("v99.0.0")


def test_the_workflows_do_what_is_said_of_them() -> None:
    """CI builds and asks the image, and starts the composition; a release is listed, and says who has built it."""
    ci, release = (workflow(ROOT / ".github/workflows" / name) for name in ("ci.yml", "release.yml"))
    tested = "\n".join(step.get("run", "") for step in steps(ci))
    released = [step.get("uses", "").partition("@")[0] or step["run"] for step in steps(release)]

    assert all(
        part in tested for part in (".ci/run", "docker build", "docs/compose.yaml up", "--read-only", "/healthz")
    )
    assert {"actions/attest-build-provenance", "actions/attest-sbom", "make sbom", ".ci/run"} <= set(released)
    for described in (ci, release):
        (at,) = [place for place, step in enumerate(steps(described)) if step.get("run") == ".ci/run"]
        assert "prometheus" in steps(described)[at - 1]["run"]
        assert steps(described)[at]["env"] == {"TIERSTREAM_REQUIRE_PROMETHEUS": "1"}
