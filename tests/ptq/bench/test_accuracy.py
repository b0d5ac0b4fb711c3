"""The harness of quantized networks: every method on the same images, runs that go on, records, peers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor import zoo
from tersor.ptq.bench import accuracy as ptq
from tersor.ptq.bench.data import load_cifar


def test_every_method_of_ours_is_another_one() -> None:
    base = ptq.RepAPQConfig.of("w4a4")
    settings = [method.settings(base) for method in ptq.METHODS if method.settings is not None]
    assert len(set(settings)) == len(settings) == 11
    with pytest.raises(ValueError, match="is none of"):
        ptq.pick(["GPTQ"])


@pytest.mark.parametrize("name", ["AdaRound-like", "QDrop-like", pytest.param("ONNX Runtime", marks=pytest.mark.slow)])
def test_compared_methods_run(name, data) -> None:
    """On the network that 8 bits do no harm."""
    net, split = zoo.load_network("tiny-mobileone"), load_cifar(data)
    (method,) = ptq.pick([name])
    images = ptq.calibration_images(net, split.train, 32, 0)
    exact = ptq.logits_of(net, net.normalize(split.held_out.pixels))
    config = ptq.RepAPQConfig.of("w8a8", iterations=2)
    found = ptq.quantized_run(method, net, images, config, split.held_out, exact)
    assert sum(found.same) / len(found.same) > 0.8 and found.seconds > 0


def test_a_run_goes_on_where_it_stopped(data, tmp_path, monkeypatch) -> None:
    net, split = zoo.load_network("tiny-repvgg"), load_cifar(data)
    plan = ptq.Plan("tiny-repvgg", ("w4a4",), ("min-max", "its first scales alone"), (0, 1), 16, 2, 40)
    measured, once = ptq.quantized_run, []

    def counted(method, *rest):
        if len(once) == 2:
            raise KeyboardInterrupt
        once.append(method.name)
        return measured(method, *rest)

    monkeypatch.setattr(ptq, "quantized_run", counted)
    file = tmp_path / "p.json"
    with pytest.raises(KeyboardInterrupt):
        list(ptq.run_plan(plan, net, split.train, split.held_out, file))
    monkeypatch.setattr(ptq, "quantized_run", lambda method, *rest: once.append(method.name) or measured(method, *rest))
    found = {name: scores for _, name, scores in ptq.run_plan(plan, net, split.train, split.held_out, file)}
    assert once == ["min-max"] * 2 + ["its first scales alone"] * 2
    assert set(found) == {ptq.FLOAT, "min-max", "its first scales alone"}
    assert found[ptq.FLOAT].agreement().value == 1.0 and len(found["min-max"].runs) == 2
    assert found["its first scales alone"].agreement().value > found["min-max"].agreement().value
    other = ptq.Plan("tiny-repvgg", ("w4a4",), ("min-max",), (0,), 17, 2, 40)
    with pytest.raises(ValueError, match="other settings"):
        list(ptq.run_plan(other, net, split.train, split.held_out, file))


def test_scores_are_worked_out_by_hand() -> None:
    exact = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    logits = exact.clone()
    logits[0] = torch.tensor([0.0, 2.0])
    one = ptq.compare(logits, exact, torch.tensor([0, 0, 1, 0]))
    assert one.right == [0, 1, 1, 0] and one.same == [0, 1, 1, 1]
    assert one.divergence == pytest.approx(2 * (1 - 2 / (1 + np.exp(2))) / 4, abs=1e-6)
    base = ptq.compare(exact, exact, torch.tensor([0, 0, 1, 0]))
    pair = ptq.Scores([one, base])
    assert pair.accuracy().value == pytest.approx(0.625) and pair.spread() == pytest.approx(0.25)
    assert pair.against(ptq.Scores([base])).value == pytest.approx(-0.125)
