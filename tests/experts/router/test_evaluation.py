"""What is measured of a router, by hand-made cases."""

from __future__ import annotations

import pytest
import torch
from router_models import EXPERTS, REQUESTS, rules

from tersor.experts.router.config import RouterConfig
from tersor.experts.router.evaluation import NGramScorer, calibration_error, evaluate
from tersor.experts.router.routing import Router
from tersor.experts.router.training import Request


def test_calibration_error_by_hand() -> None:
    # Range 0.9-1: confidence 0.95, half of two right. Range 0.6-0.7: confidence 0.65, right.
    probabilities = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.65, 0.35]])
    assert calibration_error(probabilities, torch.tensor([0, 0, 0])) == pytest.approx(2 / 3 * 0.45 + 1 / 3 * 0.35)


def test_evaluation_by_hand() -> None:
    right = {"math": True, "code": False, "chat": True}
    requests = [
        Request("3+4", "math", right),
        Request("hello", "math", right | {"chat": False}),
        Request("def ", "code", dict.fromkeys(EXPERTS, True)),
        Request("hello", "chat", right | {"math": False}),
    ]
    found = evaluate(rules(), requests)
    assert found.accuracy.value == 0.75
    assert found.confusion == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert {name: share.value for name, share in found.recall.items()} == {"math": 0.5, "code": 1.0, "chat": 1.0}
    assert found.calibration_error == pytest.approx(0.25)
    assert 0 < found.seconds.low <= found.seconds.value
    end = found.end_task
    assert end is not None
    assert (end.routed.value, end.oracle.value, end.gap.value) == (0.75, 1.0, -0.25)
    assert (end.best_name, end.best_single.value) == ("math", 0.75)
    assert evaluate(rules(), [Request("3", "math")]).end_task is None


def test_the_cheap_alternative_learns() -> None:
    scorer = NGramScorer(list(EXPERTS)).fit(REQUESTS)
    router = Router(RouterConfig(kind="rules", experts=EXPERTS), scorer)
    assert evaluate(router, REQUESTS).accuracy.value == 1.0
    torch.testing.assert_close(scorer.features(["abab"]).norm(), torch.tensor(1.0))
