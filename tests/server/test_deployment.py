"""Files for those who run servers say nothing that a server does not have."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from running_server import Running
from typer.main import get_command

from specengine.cli import app

ROOT = Path(__file__).resolve().parent.parent.parent
SERVING = ROOT / "examples" / "serving"


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def metric_names(texts: list[str]) -> set[str]:
    return {name for text in texts for name in re.findall(r"specengine:\w+", text)}


def test_the_dashboard_shows_what_a_server_measures_and_all_of_it(server: Running) -> None:
    server.complete(prompt="abab" * 8, max_tokens=20, num_speculative_tokens=3)
    text = server.ask("GET", "/metrics")[2].decode()
    samples = set(re.findall(r"^(specengine:\w+)\{", text, re.MULTILINE))
    dashboard = json.loads((SERVING / "grafana.json").read_text(encoding="utf-8"))
    shown = metric_names(expressions(dashboard))
    assert shown <= samples
    base = {name: re.sub(r"_(bucket|sum|count)$", "", name) for name in samples | shown}
    assert {base[name] for name in shown} == {base[name] for name in samples}
    variables = dashboard["templating"]["list"]
    assert metric_names([str(each["query"]) for each in variables]) <= samples
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    labels = {label for text in expressions(dashboard) for label in re.findall(r"by \((\w+)\)", text)}
    assert labels == {"le", "position", "finished_reason"}


def flags(name: str = "serve") -> set[str]:
    """Of a command."""
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def manifests(name: str) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((SERVING / name).read_text(encoding="utf-8"))


def test_what_the_manifests_start_and_probe_is_there(server: Running) -> None:
    deployment = next(each for each in manifests("kubernetes.yaml") if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert {argument.partition("=")[0] for argument in container["args"]} <= flags()
    paths = {
        container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    paths.add(pod["metadata"]["annotations"]["prometheus.io/path"])
    for path in paths:
        assert server.ask("GET", path)[0] == 200
    (timeout,) = (
        text.partition("=")[2] for text in container["args"] if text.startswith("--shutdown-timeout")
    )
    delay = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > int(timeout) + delay + 5
    service = next(each for each in manifests("kubernetes.yaml") if each["kind"] == "Service")
    labels = deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == labels == pod["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_what_the_ray_jobs_start_is_there() -> None:
    serving, service, batch = manifests("kuberay.yaml")
    (command, name, *arguments) = shlex.split(serving["spec"]["entrypoint"])
    assert (command, name) == ("specengine", "serve")
    assert {argument.partition("=")[0] for argument in arguments} <= flags(name)
    pod = serving["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    (port,) = (argument.partition("=")[2] for argument in arguments if argument.startswith("--port"))
    (listening,) = pod["spec"]["containers"][0]["ports"]
    assert listening == {"name": service["spec"]["ports"][0]["targetPort"], "containerPort": int(port)}
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    (timeout,) = (text.partition("=")[2] for text in arguments if text.startswith("--shutdown-timeout"))
    assert pod["spec"]["terminationGracePeriodSeconds"] > int(timeout) + 5
    (command, name, *arguments) = shlex.split(batch["spec"]["entrypoint"])
    assert (command, name) == ("specengine", "run-batch")
    assert {argument for argument in arguments if argument.startswith("--")} <= flags(name)
    (mount,) = batch["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    assert all(Path(each).parent == Path(mount["mountPath"]) for each in arguments if each.startswith("/"))
    pinned = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for job in (serving, batch):
        assert [job["spec"]["rayClusterSpec"]["rayVersion"]] == pinned
        assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_image_starts_what_is_there_and_holds_the_whole_package() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (entry,) = (json.loads(line.partition(" ")[2]) for line in lines if line.startswith("ENTRYPOINT"))
    assert entry[:2] == ["specengine", "serve"]
    assert {word for word in entry if word.startswith("--")} <= flags()
    copied = {
        word
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for word in shlex.split(line)[1:-1]
    }
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert {"csrc", "kernels", "specengine"} <= copied


def test_a_metric_that_is_not_there_would_be_noticed(server: Running) -> None:
    text = server.ask("GET", "/metrics")[2].decode()
    assert not metric_names(["rate(specengine:spec_decode_num_draft_total[1m])"]) <= metric_names([text])


@pytest.mark.parametrize("path", sorted(SERVING.glob("*.json")), ids=lambda path: path.name)
def test_dashboards_are_written_as_json_writes_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=1) + "\n"
