"""Settings of RepAPQ: widths in words, what is refused, and what stays without training."""

from __future__ import annotations

from typing import Any

import pytest

from tersor.ptq.config import RepAPQConfig


@pytest.mark.parametrize(
    ("words", "weight_bits", "activation_bits"), [("w8a8", 8, 8), ("W4A8", 4, 8), ("w2a16", 2, 16), ("w6a6", 6, 6)]
)
def test_widths_in_words(words: str, weight_bits: int, activation_bits: int) -> None:
    config = RepAPQConfig.of(words, iterations=3)
    assert (config.weight_bits, config.activation_bits, config.iterations) == (weight_bits, activation_bits, 3)


@pytest.mark.parametrize("words", ["8a8", "w8", "w8a", "w8a8a8", "a8w8", "w-8a8", "wxa8", ""])
def test_other_words_are_refused(words: str) -> None:
    with pytest.raises(ValueError, match="must be such as 'w8a8'"):
        RepAPQConfig.of(words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weight_bits=1 must be from 2 to 8, or 16"),
        ({"activation_bits": 9}, "activation_bits=9"),
        ({"first_last_bits": 0}, "first_last_bits=0"),
        ({"weight_init": "max"}, "weight_init='max' must be one of"),
        ({"activation_init": "output"}, "activation_init='output'"),
        ({"loss": "l2"}, "loss='l2'"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"drop": 1.0}, "drop=1.0 must be from 0 to less than 1"),
        ({"drop": -0.1}, "drop=-0.1"),
        ({"iterations": -1}, "iterations=-1 must not be negative"),
        ({"init_images": 0}, "init_images=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"affine_rate": -1e-3}, "learning rates must not be negative"),
        ({"weight_rate": -1e-3}, "learning rates must not be negative"),
        ({"stage_weight": -1.0}, "stage_weight"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepAPQConfig(**settings)


def test_plain_quantizers_keep_the_bits_and_train_nothing() -> None:
    config = RepAPQConfig.of("w4a6", seed=3)
    for init, activations in (("minmax", "minmax"), ("percentile", "percentile"), ("mse", "mse"), ("output", "mse")):
        plain = config.without_training(init)
        assert (plain.weight_init, plain.activation_init, plain.iterations) == (init, activations, 0)
        assert (plain.weight_bits, plain.activation_bits, plain.seed) == (4, 6, 3)


def test_few_bits_learn_faster_unless_a_rate_is_given() -> None:
    assert [RepAPQConfig().rate_of_weights(bits) for bits in (2, 5, 6, 8)] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert RepAPQConfig(weight_rate=0.5).rate_of_weights(2) == 0.5
