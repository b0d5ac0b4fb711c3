"""The application of Serve: options and config files; and two replicas that live, one of which is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="a cluster needs the extra cluster")

import httpx2
import yaml
from invoke import run
from ray.serve.schema import ServeDeploySchema
from serving import offline

from tersor.cli import app
from tersor.experts.bench import cluster as bench
from tersor.experts.host import ExpertHost
from tersor.experts.server.cluster import ClusterOptions, application

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--replicas 2", "need --cluster"),
        ("--autoscaling max_replicas=2", "need --cluster"),
        ("--cluster --allow-runtime-updates", "--allow-runtime-updates is for one machine"),
        ("--cluster --replicas 0", "--replicas 0 must be at least 1"),
        ("--cluster --replicas 2 --autoscaling max_replicas=4", "exclude each other"),
        ("--cluster --autoscaling most=4", "most is no field"),
        ("--cluster --autoscaling max_replicas", "must be NAME=VALUE"),
        ("--cluster --autoscaling max_replicas=few", "--autoscaling max_replicas"),
        ("--cluster --router nowhere", "nowhere: no router.json"),
        ("--cluster --host 0.0.0.0", "give --keys"),
        ("--cluster --cache zipcache --batching continuous", "needs --batching static"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused_in_one_line(bank: Path, options: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        run(app, "experts", "serve", str(bank), "--port", "0", *options.split())
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_bank_without_deltas_is_refused_before_ray_is_started(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no delta"):
        run(app, "experts", "serve", str(tmp_path), "--port", "0", "--cluster")


def deployments(made: Any) -> dict[str, Any]:
    """The deployments of an application by their names."""
    ingress = made._bound_deployment
    experts = ingress.init_args[0]._bound_deployment
    return {each.name: each for each in (ingress, experts)}


def test_the_config_file_is_one_of_serve_and_its_options_are_ours(bank: Path, tmp_path: Path) -> None:
    text = (ROOT / "examples" / "serving" / "serve.yaml").read_text(encoding="utf-8")
    (found,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert found.import_path == "tersor.experts.server.cluster:application"
    keys = tmp_path / "keys"
    keys.write_text("k\n")
    made = application({**found.args, "bank": str(bank), "base": None, "router": "none", "keys": str(keys)})
    assert {each.name for each in found.deployments} <= set(deployments(made))


def test_the_example_for_kubernetes_deploys_the_same_config() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    service = yaml.safe_load(
        next(text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "RayService" in text)
    )
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    assert set(config["applications"][0]["args"]) <= set(ClusterOptions.__dataclass_fields__)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"banks": "x"}, "'banks', which is no option"),
        ({"places": "many"}, "args places"),
        ({}, "args bank: Field required"),
    ],
)
def test_what_is_wrong_in_a_config_file_is_named(bank: Path, args: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        application({"bank": str(bank), **args} if args else args)
    assert "\n" not in str(refused.value)


def test_scaling_places_and_the_end_go_to_serve(bank: Path) -> None:
    made = deployments(
        application({"bank": str(bank), "autoscaling": {"min_replicas": 1, "max_replicas": "4"}, "places": 5,
                     "max_queue": 7, "grace": 9, "device": "cuda"})
    )["Experts"]  # fmt: skip
    config = made._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 4)
    assert (config.max_ongoing_requests, config.max_queued_requests) == (5, 7)
    assert config.graceful_shutdown_timeout_s == 9 and made.ray_actor_options["num_gpus"] == 1
    assert deployments(application({"bank": str(bank), "replicas": 3}))["Experts"].num_replicas == 3


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_replica_loses_nothing_and_a_budget_of_bytes_holds() -> None:
    with bench.cluster(seed=3) as (one, at, expected):
        assert httpx2.get(f"{at}health").status_code == 200 and len(bench.replicas(at)) == 2
        for key, text in list(expected.items())[::9]:
            for stream in (False, True):
                assert bench.ask(at, *key, stream=stream) == bench.ask(one, *key, stream=stream) == (200, text)
        asked = [list(expected)[n * 7 % len(expected)] for n in range(60)]
        seen = bench.load(at, asked, expected, together=6)
        assert (seen.right, set(seen.statuses)) == (60, {200})
        assert bench.resident(at) <= bench.ROOM, "though Serve counts four"
        hot, share = bench.shares(at, expected, requests=96, together=24)
        assert hot.right == 96 and share < 0.95, "one hot expert, and two replicas answer"
        killed = bench.kill_one(at, expected, requests=60, together=6)
        assert killed.right + killed.ended == 60 and killed.wrong == 0 and set(killed.statuses) == {200}
        assert httpx2.get(f"{at}health").status_code == 200
        assert bench.wait_for_all(at) < 90


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_command_serves_and_stops(bank: Path, reference: ExpertHost) -> None:
    command = [sys.executable, "-m", "tersor", "experts", "serve", str(bank), "--base", str(bank.parent / "base")]
    server = subprocess.Popen(
        [*command, "--cluster", "--replicas", "1", "--port", "0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stderr is not None
    lines: list[str] = []
    for line in server.stderr:
        lines.append(line)
        if found := re.search(r"4 experts on Ray Serve: (http://\S+)", line):
            break
    assert found, lines
    rest = threading.Thread(target=lambda: lines.extend(server.stderr or ()))
    rest.start()
    body = {"model": "reverse", "prompt": "bdac>", "max_tokens": 12}
    answer = httpx2.post(f"{found[1]}/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] == offline(reference, "bdac>", "reverse", 12)
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    rest.join(10)
    server.stderr.close()
