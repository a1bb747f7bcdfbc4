"""The Helm chart, rendered by Helm's own engine without a cluster, and held against what Kubernetes accepts."""

from __future__ import annotations

import importlib
import re
import shlex
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart, HelmError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kubernetes_validate.utils import validate

from consumer.config import load
from consumer.exits import STOP_MARGIN_SECONDS
from shown import check_tierstream

CHART = Path(__file__).parents[2] / "helm" / "tierstream"
CASES = sorted(CHART.glob("ci/*-values.yaml"))
KUBERNETES = ("1.34", "1.35", "1.36", "1.37")

Manifest = dict[str, Any]


@cache
def chart() -> Chart:
    """The chart, loaded once; it does not change."""
    return Chart.load(CHART)


def render(values: Manifest) -> list[Manifest]:
    """Render the chart; return its manifests."""
    made = chart().render(values=values, name="release", namespace="streams")
    return [
        document
        for path, text in made.items()
        if not path.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
        if document
    ]


def values_of(case: Path) -> Manifest:
    """Read one file of values."""
    values: Manifest = yaml.safe_load(case.read_text(encoding="utf-8"))
    return values


def only(manifests: list[Manifest], kind: str) -> Manifest:
    """The one manifest of a kind."""
    (found,) = [one for one in manifests if one["kind"] == kind]
    return found


def pod(manifests: list[Manifest]) -> Manifest:
    """The pod that the Deployment makes."""
    found: Manifest = only(manifests, "Deployment")["spec"]["template"]["spec"]
    return found


@cache
def custom_model(api_version: str, kind: str) -> Any:
    """The model of a custom resource, from packages made of the operators' own definitions."""
    module = {
        "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
        "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    }[api_version]
    return getattr(importlib.import_module(module), kind)


def check(manifests: list[Manifest], releases: tuple[str, ...] = KUBERNETES) -> Iterator[str]:
    """Validate strictly, for all these releases of Kubernetes; yield the kinds seen."""
    for manifest in manifests:
        yield manifest["kind"]
        if "." in manifest["apiVersion"].partition("/")[0] and not manifest["apiVersion"].endswith("k8s.io/v1"):
            given_names = _names(manifest)
            model = custom_model(manifest["apiVersion"], manifest["kind"]).model_validate(manifest)
            understood = _names(model.model_dump(by_alias=True, exclude_unset=True, mode="json"))
            assert given_names <= understood, f"fields nobody reads: {given_names - understood}"
            continue
        for version in releases:
            validate(manifest, version, strict=True)


def _names(value: Any, place: str = "") -> set[str]:
    if isinstance(value, dict):
        return {f"{place}.{name}" for name in value} | {
            found for name, below in value.items() for found in _names(below, f"{place}.{name}")
        }
    if isinstance(value, list):
        return {found for below in value for found in _names(below, f"{place}[]")}
    return set()


@pytest.fixture(autouse=True)
def _quiet_models() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the model packages' own
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_every_case_renders_to_what_kubernetes_accepts(case: Path) -> None:
    """Each manifest is valid for every supported release of Kubernetes, with no field that nobody reads."""
    kinds = set(check(render(values_of(case))))

    assert {"ConfigMap", "Deployment"} <= kinds


def test_the_cases_together_render_every_template() -> None:
    """A template that no case renders is checked by nobody."""
    seen = {one["kind"] for case in CASES for one in render(values_of(case))}

    assert seen == {
        "ConfigMap",
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "Pod",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
        "ScaledObject",
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_what_containers_run_and_notes_say_are_commands_of_ours(case: Path) -> None:
    """As the command line itself takes them: an option that is gone would be a pod that does not start."""
    manifests = render(values_of(case))
    (service,) = pod(manifests)["containers"]
    testers = [one["spec"]["containers"][0]["args"] for one in manifests if one["kind"] == "Pod"]
    made = chart().render(values=values_of(case), name="release", namespace="streams")
    (notes,) = [text for path, text in made.items() if path.endswith("NOTES.txt")]
    advised = re.findall(r" -- tierstream (.+)$", notes, re.MULTILINE)

    assert len(advised) == 2
    for words in (service["args"], *testers, *map(shlex.split, advised)):
        check_tierstream(words)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_rendered_settings_are_settings_of_the_service(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ConfigMap holds is read by the service itself, with a secret where the case mounts one."""
    config_map = [one for one in render(values_of(case)) if "tierstream.yaml" in one.get("data", {})]
    file = tmp_path / "tierstream.yaml"
    file.write_text(config_map[0]["data"]["tierstream.yaml"], encoding="utf-8")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "kafka__sasl_password").write_text("s", encoding="utf-8")
    monkeypatch.setenv("TIERSTREAM_SECRETS_DIR", str(secrets))

    config = load(file)

    assert (config.admin.host, config.admin.port) == ("0.0.0.0", 9464)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_grace_period_outlasts_the_longest_stop(case: Path) -> None:
    """Contract 11: a stop takes drain_timeout + 15 s at most; the chart gives 15 s more, and the wait before it."""
    values = values_of(case)
    drain = int(str(values["config"].get("rebalance", {}).get("drain_timeout", "25s")).removesuffix("s"))
    wait = values.get("preStopSeconds", 2)

    assert pod(render(values))["terminationGracePeriodSeconds"] == drain + STOP_MARGIN_SECONDS + 15 + wait


@pytest.mark.parametrize(
    ("duration", "seconds"), [("25s", 25), ("1m", 60), ("1m30s", 90), ("1500ms", 2), ("0.5m", 30), ("1h", 3600)]
)
def test_durations_of_the_service_are_understood(duration: str, seconds: int) -> None:
    """The grace period follows whatever way the drain time-out is written."""
    values = values_of(CASES[0]) | {"preStopSeconds": 0}
    values["config"] = values["config"] | {"rebalance": {"drain_timeout": duration}}

    assert pod(render(values))["terminationGracePeriodSeconds"] == seconds + 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_pod_has_no_more_rights_than_it_needs(case: Path) -> None:
    """Non-root by number, nothing writable but its volumes, no capabilities, no token of the cluster."""
    manifests = render(values_of(case))
    spec = pod(manifests)
    (container,) = spec["containers"]

    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_renewed_secret_reaches_a_pod_that_runs() -> None:
    """As a whole folder: a file mounted by `subPath` stays for ever what it was when the pod began."""
    (container,) = pod(render(values_of(CHART / "ci" / "cloud-values.yaml")))["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}

    assert {"/etc/tierstream-tls", "/run/secrets/tierstream"} <= mounts.keys()
    assert [path for path, mount in mounts.items() if "subPath" in mount or "subPathExpr" in mount] == []


def test_a_change_of_settings_changes_the_pods() -> None:
    """The ConfigMap's checksum stands in the pods' annotations."""

    def checksum(group: str) -> str:
        values = {"config": {"kafka": {"bootstrap_servers": ["k:9092"], "group_id": group}}}
        annotations = only(render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/config"])

    assert checksum("a") == checksum("a") != checksum("b")


def test_the_tests_pod_is_not_one_of_the_services_pods() -> None:
    """Else it would be scraped, counted by the disruption budget and reached through the service."""
    manifests = render(values_of(CASES[0]))
    selector = only(manifests, "Deployment")["spec"]["selector"]["matchLabels"]
    tester = only(manifests, "Pod")

    assert not selector.items() <= tester["metadata"]["labels"].items()
    assert selector == only(manifests, "Service")["spec"]["selector"]


LOCAL = "bigtable (high_volume, change_log) and gcs (long_term)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"replicaCount": 2}, LOCAL),
        ({"autoscaling": {"type": "keda"}}, LOCAL),
        ({"autoscaling": {"type": "hpa"}}, LOCAL),
        ({"serviceMonitor": {"enabled": True}, "service": {"enabled": False}}, "service.enabled"),
        ({"replicas": 2}, "replicas"),
        ({"config": {"kafka": {"bootstrap_server": "a:1"}}}, "bootstrap_server"),
        ({"config": {"kafka": {"sasl_password": "s"}}}, "sasl_password"),
        ({"config": {"ordering": "none"}}, "ordering"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_by_name(change: Manifest, said: str) -> None:
    """Contract 5: more than one pod on one host's storage is refused; so are misspelt names, and secrets."""
    values = values_of(CHART / "ci" / "default-values.yaml")
    for name, value in change.items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value

    with pytest.raises(HelmError) as caught:
        render(values)

    assert said in str(caught.value)


def test_the_values_shown_in_the_readme_render() -> None:
    """They can be copied as they are."""
    text = (CHART / "README.md").read_text(encoding="utf-8")
    shown = text[text.index("```yaml") + len("```yaml") : text.index("```\n\n*")]

    assert only(render(yaml.safe_load(shown)), "Deployment")["spec"]["replicas"] == 3


def test_scaling_out_stops_where_partitions_end() -> None:
    """A member without a partition only costs money."""
    scaled = only(render(values_of(CHART / "ci" / "cloud-values.yaml")), "ScaledObject")

    assert scaled["spec"]["maxReplicaCount"] == 24
    assert [trigger["type"] for trigger in scaled["spec"]["triggers"]] == ["kafka", "kafka", "prometheus"]


# ------------------------------------------------------------------------------------------------- any values

_SCHEMA = chart().schema
_KEPT_OUT = {"config", "global", "affinity", "tolerations", "extraVolumes", "extraVolumeMounts", "extraEnv"}
"""Values that are Kubernetes' own objects, which the schema leaves to Kubernetes; and the settings, tested above."""


def _values(schema: Manifest) -> st.SearchStrategy[Any]:
    """Generate what a part of the schema accepts."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([_values(one) for one in schema["anyOf"]])
    match schema["type"]:
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(schema.get("minimum", 0), min(schema.get("maximum", 1000), 100_000))
        case "string":
            pattern = schema.get("pattern")
            exact = pattern and pattern.removesuffix("$") + r"\Z"
            texts = st.from_regex(exact, fullmatch=True) if exact else st.text(max_size=20)
            return texts.filter(lambda text: schema.get("minLength", 0) <= len(text) <= schema.get("maxLength", 300))
        case "array":
            items = schema["items"]
            if items == {"type": "object"}:
                return st.just([])
            return st.lists(_values(items), min_size=schema.get("minItems", 0), max_size=3)
    if "properties" in schema:
        known = {name: _values(below) for name, below in schema["properties"].items()}
        return st.fixed_dictionaries({}, optional=known)
    names = _values({"type": "string"} | schema["propertyNames"])
    return st.dictionaries(names, _values(schema["additionalProperties"]), max_size=2)


_ANY = st.fixed_dictionaries(
    {},
    optional={
        name: _values(below)
        for name, below in (_SCHEMA or {})["properties"].items()
        if name not in _KEPT_OUT and below.get("items") != {"type": "object"}
    },
)


@pytest.mark.slow
@pytest.mark.timeout(180)
# Without shrinking: rendering takes its time, and values say by themselves what is wrong with them.
@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(values=_ANY, cloud=st.booleans())
def test_whatever_the_schema_accepts_is_valid_or_refused_in_words(values: Manifest, cloud: bool) -> None:
    """No accepted value makes a manifest that Kubernetes refuses; what contradicts itself is refused by the chart."""
    case = values_of(CHART / "ci" / ("hpa-values.yaml" if cloud else "default-values.yaml"))
    try:
        manifests = render(values | {"config": case["config"]})
    except HelmError as error:
        assert any(text in str(error) for text in ("needs", "is more than")), error  # noqa: PT017 - both ways out are right
    else:
        list(check(manifests, KUBERNETES[:1]))
