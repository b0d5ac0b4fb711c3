"""Two processes that share the rollouts of an update have the gradient of one that makes them all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from zipr1 import policy

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from zipr1 import MODEL, config, data
from tersor import zoo
from tersor.rl.trainer import ROW_TAU, ZipR1Trainer

out, count = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
net = type(zoo.load_model(MODEL)).from_pretrained(out / "policy", dtype=torch.float32)
for name, weight in net.named_parameters():
    weight.requires_grad_("visual" not in name)
given = config(
    out, per_device_train_batch_size=8 // count, max_steps=1, use_cpu=True, ddp_backend="gloo" if count > 1 else None,
    # Every row is right or wrong by its threshold alone, so that both runs have the same rewards whatever they draw.
    learning_rate=1.0, optim="sgd", max_grad_norm=0.0, beta=0.0, generation_kwargs={"do_sample": False, "top_k": None,
    "temperature": None, "top_p": None}, shuffle_dataset=False,
)
made = ZipR1Trainer(net, lambda text, answer: float(text == "red"), given, train_dataset=data(2),
                    processing_class=zoo.load_processor(MODEL))
seen, compute = [], made._compute_loss
def watched(model, inputs):
    seen.extend(inputs[ROW_TAU].tolist())
    return compute(model, inputs)
made._compute_loss = watched
made.train()
row = [each for each in made.state.log_history if "token_ratio" in each][0]
rank = int(os.environ.get("RANK", 0))
sums = {name: weight.double().sum().item() for name, weight in made.session.model.named_parameters()}
(out / f"{count}-{rank}.json").write_text(json.dumps({"row": row, "sums": sums, "taus": sorted(seen)}))
"""


def start(folder: Path, count: int) -> list[dict]:
    """The script in ``count`` processes, and what each wrote."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    support = Path(__file__).parents[1] / "support"
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(support), *sys.path]), "PYTHONWARNINGS": "ignore",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    started = []
    for rank in range(count):
        own = (
            {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            if count > 1
            else environment
        )
        started.append(subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=own, stderr=subprocess.PIPE))
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-3000:]
    return [json.loads((folder / f"{count}-{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    policy(tmp_path)
    (alone,), both = start(tmp_path, 1), start(tmp_path, 2)
    assert both[0]["taus"] == both[1]["taus"] == sorted(set(alone["taus"]))
    assert both[0]["sums"] == both[1]["sums"]
    for name in ("token_ratio", "zipr1_reward", "soft_token_ratio", "groups/all_right"):
        assert both[0]["row"][name] == pytest.approx(alone["row"][name], rel=1e-5)
    assert both[0]["sums"] == pytest.approx(alone["sums"], rel=1e-4, abs=1e-4)
