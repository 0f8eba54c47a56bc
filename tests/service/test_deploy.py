"""The files of deploy/ say what the server understands; the dashboard asks for what it serves, as what it is."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from prometheus_client.parser import text_string_to_metric_families

from swiftvideo.sdk import cli
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.server.drain import SAVING

from .harness import ServerProcess

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVE = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Options as `swiftvideo serve` reads them; fails where it would not."""
    with SERVE.make_context("serve", list(arguments)) as context:
        return dict(context.params)


def docker() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_starts_a_safe_server_as_a_user_without_rights() -> None:
    found = dict(docker())
    first, dashes, *command = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])
    assert (first, dashes, command[:2]) == ("tini", "--", ["swiftvideo", "serve"]), (
        "process 1 passes signals on"
    )
    options = parsed(command[2:])
    assert options["host"] == "0.0.0.0" and not options["insecure"]
    assert options["tokens"] and options["certificate"] and options["key"]
    assert int(found["USER"]) > 0 and f"--uid {found['USER']} " in (DEPLOY / "Dockerfile").read_text()
    assert found["STOPSIGNAL"] == "SIGTERM"
    assert str(options["metrics_port"]) in found["EXPOSE"].split()
    assert f"http://127.0.0.1:{options['metrics_port']}/healthz" in found["HEALTHCHECK"]
    assert f"mkdir -m 700 {options['snapshots']} " in (DEPLOY / "Dockerfile").read_text()
    assert found["VOLUME"] == str(options["snapshots"])
    instructions = [name for name, _ in docker()]
    assert instructions.count("FROM") == 2 and instructions.index("USER") > instructions.index("COPY")
    source, target = found["COPY"].removeprefix("--from=build ").split()
    assert source == target and found["ENV"] == f"PATH={target}/bin:$PATH"
    assert any(f"venv --without-pip {target} " in text for _, text in docker())


def test_compose_mounts_what_the_image_wants_and_waits_for_the_grace_time() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"]["swiftvideo"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    mounts = _targets(compose, "swiftvideo")
    wanted = {str(Path(part).parent) for part in json.loads(dict(docker())["CMD"]) if part.startswith("/")}
    assert wanted == {"/run/secrets"} and mounts["/run/secrets"] == "./secrets", (
        "a folder, so that rotation is seen"
    )
    assert mounts[dict(docker())["VOLUME"]] in compose["volumes"]
    assert "init" not in service, "the image has its own"
    assert int(service["stop_grace_period"].removesuffix("s")) > parsed([])["grace"] + SAVING + 1
    for other in ("prometheus", "grafana"):
        for volume in compose["services"][other]["volumes"]:
            assert (DEPLOY / volume.split(":")[0]).exists()
    assert {each["restart"] for each in compose["services"].values()} == {"unless-stopped"}
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["swiftvideo:9464"]
    (config,) = [at for at in _targets(compose, "prometheus") if at.endswith("prometheus.yml")]
    for name in prometheus["rule_files"]:
        assert _targets(compose, "prometheus")[f"{Path(config).parent}/{name}"] == f"./{name}"


def _targets(compose: Any, service: str) -> dict[str, str]:
    """What is mounted, by where."""
    return dict(volume.split(":")[1::-1] for volume in compose["services"][service]["volumes"])


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services, mounts = compose["services"], _targets(compose, "grafana")
    provisioning = "/etc/grafana/provisioning"
    (source,) = yaml.safe_load(
        (DEPLOY / mounts[f"{provisioning}/datasources"] / "prometheus.yaml").read_text()
    )["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"])[1] in services  # type: ignore[index]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    assert source["jsonData"]["timeInterval"] == job["scrape_interval"]
    (provider,) = yaml.safe_load(
        (DEPLOY / mounts[f"{provisioning}/dashboards"] / "swiftvideo.yaml").read_text()
    )["providers"]
    folder = provider["options"]["path"]
    assert [inside for inside in mounts if inside.startswith(f"{folder}/")] == [f"{folder}/swiftvideo.json"]


def test_the_image_is_built_from_the_package_alone_and_secrets_go_into_no_commit() -> None:
    root = DEPLOY.parent
    everything, *lines = [
        line for line in (root / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    about = tomllib.loads((root / "pyproject.toml").read_text())
    folders = {Path(path).parts[0] for path in about["tool"]["scikit-build"]["wheel"]["packages"].values()}
    files = {
        about["project"]["readme"],
        *about["project"]["license-files"],
        "pyproject.toml",
        "CMakeLists.txt",
    }
    assert everything == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == folders | files
    assert "/deploy/secrets/" in (root / ".gitignore").read_text().splitlines()


def test_the_unit_starts_a_safe_server_and_stops_it_gently() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "swiftvideo.service")
    service = unit["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[1] == "serve"
    options = parsed(command[2:])
    assert options["tokens"] and options["certificate"] and options["key"] and not options["insecure"]
    assert (
        service["KillSignal"] == "SIGTERM" and int(service["TimeoutStopSec"]) > options["grace"] + SAVING + 1
    )
    assert str(options["snapshots"]) == f"/var/lib/{service['StateDirectory']}"
    text = (DEPLOY / "swiftvideo.service").read_text()
    assert re.findall(r"%d/(\S+)", service["ExecStart"]) == re.findall(r"^LoadCredential=(\S+):", text, re.M)
    assert service["Type"] == "notify" and service["RestartPreventExitStatus"] == "2"
    gpu = {"PrivateDevices", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute", "ProcSubset"}
    assert not gpu & set(service)


def test_an_option_that_does_not_exist_is_seen() -> None:
    with pytest.raises(Exception, match="No such option"):  # typer has a click of its own
        parsed(["--no-such-option"])


EXPRESSION = re.compile(
    r"(histogram_quantile\(0\.\d+, )?(?:sum by \(([\w, ]+)\) \()?(rate\()?(\w+)(?:\[\$__rate_interval\]\))?\)*"
)
"""What the dashboard uses of PromQL: quantile, labels that are kept, rate, metric."""


def scraped(server: ServerProcess) -> tuple[dict[str, str], set[tuple[str, frozenset[tuple[str, str]]]]]:
    """Kinds of metrics by the names that are asked for; all series."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=20) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    endings = {"counter": "_total", "histogram": "_bucket"}
    kinds = {
        family.name + endings.get(family.type, ""): family.type
        for family in families
        if not family.name.endswith("_created")
    }
    return kinds, {
        (sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples
    }


def test_the_dashboard_asks_for_every_metric_as_what_it_is(server: ServerProcess) -> None:
    kinds, series = scraped(server)
    labels: dict[str, set[str]] = {name: set() for name in kinds}
    for name, pairs in series:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    for name in kinds:
        if name.startswith("swiftvideo_gpu_"):
            labels[name] = {"gpu"}  # as test_server.py sees them: without a GPU there is no series
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set()
    for expression, legend in ((target["expr"], target["legendFormat"]) for target in targets):
        match = EXPRESSION.fullmatch(expression)
        assert match and expression.count("(") == expression.count(")"), expression
        quantile, kept, rate, name = match.groups()
        asked.add(name)
        if name.startswith("process_") and not Path("/proc/self").exists():
            continue  # Prometheus's client has these from there alone
        assert name in kinds, f"not served: {name}"
        assert bool(rate) is (kinds[name] != "gauge"), f"{expression}: {name} is a {kinds[name]}"
        assert bool(quantile) is (kinds[name] == "histogram"), expression
        shown = set(re.findall(r"{{(\w+)}}", legend))
        assert shown == labels[name] - {"le"}, f"{expression} has {labels[name]}, its legend {legend!r}"
        if kept is not None:
            assert set(kept.split(", ")) == shown | ({"le"} if quantile else set()), expression
    unseen = {"swiftvideo_forwards_after_cancel"}
    ours = {name for name in kinds if name.startswith("swiftvideo_")}
    assert ours - asked == unseen, f"not on the dashboard: {sorted(ours - asked - unseen)}"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


SELECTOR = re.compile(r"([a-z]\w*?_\w+)(?:{([^}]*)})?")
"""A metric in an alert's expression, and its matchers."""


def test_alerts_ask_for_what_is_served(server: ServerProcess) -> None:
    _, series = scraped(server)
    names = {name for name, _ in series}
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    for rule in group["rules"]:
        asked = SELECTOR.findall(rule["expr"])
        assert asked or rule["expr"].startswith("up{")
        for name, matchers in asked:
            assert name in names, f"{rule['alert']}: {name} is not served"
            kept = {label: values.split("|") for label, values in re.findall(r'(\w+)=~?"([^"]+)"', matchers)}
            assert kept.pop("job", [job["job_name"]]) == [job["job_name"]]
            for label, values in kept.items():  # from the start: what is first is an increase, too
                for value in values:
                    assert any(name == n and (label, value) in pairs for n, pairs in series), (name, value)


def test_every_alert_has_a_test_that_sees_it_fire_and_one_that_does_not() -> None:
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    quiet, loud = yaml.safe_load((DEPLOY / "alerts_test.yaml").read_text())["tests"]
    alerts = {rule["alert"] for rule in group["rules"]}
    for tests, fires in ((quiet, False), (loud, True)):
        cases = {case["alertname"]: bool(case.get("exp_alerts")) for case in tests["alert_rule_test"]}
        assert cases == dict.fromkeys(alerts, fires)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Prometheus' promtool")
def test_prometheus_reads_its_files_and_the_alerts_fire(server: ServerProcess) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=20) as response:
        metrics = response.read()
    for command, given in (
        (["check", "config", str(DEPLOY / "prometheus.yaml")], b""),
        (["test", "rules", str(DEPLOY / "alerts_test.yaml")], b""),
        (["check", "metrics"], metrics),
    ):
        done = subprocess.run(["promtool", *command], check=False, input=given, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_happens_first_is_an_increase_to_prometheus(server: ServerProcess) -> None:
    _, before = scraped(server)
    with Client(server.address) as client:
        with client.generate("w1", policy="cut") as video:
            next(video)
            video.prompt("w2")
            while not next(video).mode:
                pass
    server.idle()
    _, after = scraped(server)
    assert after == before
    counted = server.metrics()
    assert counted['swiftvideo_switches_total{mode="cut"}'] == 1
    assert counted['swiftvideo_sessions_ended_total{reason="stopped"}'] == 1
