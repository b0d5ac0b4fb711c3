"""`tersor experts bench` on a tiny shape: every timing is of what it says, and records are complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.experts.bench.speed import CONTEXT, Decoder, random_expert, random_model, time_registered, with_expert
from tersor.experts.config import DeltaConfig
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import ExpertHost


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("tiny", seed=1)


def test_random_experts_are_whole_deltas(model: Any, tmp_path: Path) -> None:
    config = DeltaConfig(num_salient=3)
    delta = random_expert(model, config, seed=2)
    delta.save_pretrained(tmp_path)
    read = ExpertDelta.from_pretrained(tmp_path)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in delta.tensors.items())
    linears = {name for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(delta.manifest.modules) == {f"model.layers.{name}" for name in linears}
    assert delta.dense("model.layers.0.mlp.up_proj").abs().max() > 0
    other = random_expert(model, config, seed=3)
    assert not torch.equal(
        other.tensors["model.layers.0.mlp.up_proj.qweight"], read.tensors["model.layers.0.mlp.up_proj.qweight"]
    )
    with pytest.raises(ValueError, match="choose one of"):
        random_model("huge", seed=1)


def test_what_is_timed_answers_as_the_expert(model: Any) -> None:
    """The timed call runs the model with the expert's routes, one token behind the same context each time."""
    host = ExpertHost(model)
    host.load_expert("a", random_expert(model, DeltaConfig(), seed=1))
    decode = Decoder(model, 2)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    for names in (None, "a", None, ["a", "a"]):
        with_expert(host, names, decode)()
        assert decode.cache.get_seq_length() == CONTEXT
    handle.remove()
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[3])
    host.close()


def test_registered_experts_are_all_resident(model: Any) -> None:
    host = ExpertHost(model)
    deltas = (random_expert(model, DeltaConfig(), seed=seed) for seed in range(3))
    found = time_registered(host, deltas, (1, 3), tokens=1, repeats=2)
    assert {count: len(seconds) for count, seconds in found.items()} == {1: 2, 3: 2}
    assert set(host.list_experts().values()) == {"device"}
    host.close()
