"""Settings of a ZipR1 training: the paper's, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from zipr1 import config

from tersor.rl.config import ZipR1Config, paper_grid


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ZipR1Config(output_dir=str(tmp_path), per_device_train_batch_size=8)
    assert paper_grid() == [0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975]
    assert (found.thresholds, found.num_generations, found.eval_threshold) == (paper_grid(), 8, 0.975)
    assert (found.beta, found.loss_type, found.scale_rewards) == (0.04, "grpo", "group")
    assert (found.objective, found.gate, found.efficiency_weight) == ("pathwise", "group_any", 1.0)
    assert not found.use_bias_correction_kl
    assert found.recipe().policy == "evict"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": [0.9, 0.8]}, "ascending order"),
        ({"thresholds": []}, "ascending order"),
        ({"thresholds": [0.5, 1.1]}, "at most 1"),
        ({"eval_threshold": 0.0}, "at most 1"),
        ({"objective": "reward"}, "objective='reward' must be one of"),
        ({"gate": "all"}, "gate='all' must be one of"),
        ({"correct_advantage": "clamp"}, "correct_advantage='clamp'"),
        ({"efficiency_weight": -1.0}, "must not be negative"),
        ({"zipvl": {"tau": 0.5}}, "must leave out tau"),
        ({"zipvl": {"policy": "quantize"}}, "must leave out tau"),
        ({"zipvl": {"nothing": 1}}, "does not know"),
        ({"zipvl": {"min_tokens": -1}}, "min_tokens"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"use_transformers_continuous_batching": True}, "continuous batching"),
        ({"per_device_train_batch_size": 2, "generation_batch_size": 4, "num_generations": 4}, None),
        ({"per_device_train_batch_size": 6, "num_generations": 3}, None),
    ],
)
def test_what_would_train_something_else_is_refused(tmp_path: Path, settings, message: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if message is None:
            config(tmp_path, **settings)
            return
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 6, "num_generations": 6}, "evenly"),
        ({"efficiency_weight": 2.0}, "can beat a right one"),
        ({"beta": 0.0}, "beta=0"),
        ({"top_p": 0.9}, "top_p cuts"),
        ({"temperature": 0.7}, "temperature cuts"),
    ],
)
def test_what_is_rarely_meant_is_said(tmp_path: Path, settings, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        config(tmp_path, **settings)
