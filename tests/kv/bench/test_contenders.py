"""Every contender generates on a tiny Llama and holds the bytes that it should."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import prompt
from transformers import AutoModelForCausalLM, LlamaConfig

from tersor._compat import with_cache
from tersor.kv.bench.contenders import FULL, bytes_at_half_precision, contenders, half_precision_dense, peers, pick
from tersor.kv.bench.peers import unavailable
from tersor.kv.tape import RECORDER, record, replay

NAMES = [each.name for each in peers()]


TOKENS = 320


@pytest.fixture(scope="module")
def model():
    """A Llama with head dimension 64, on which parameters weigh as little as on a real one."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=199, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", NAMES)
def test_generates(model, name: str) -> None:
    cache = pick([name])[1].build(model.config)
    ids = prompt(2, 60)
    with RECORDER.on(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "generate was given a")
        output = model.generate(ids, **with_cache(cache), max_new_tokens=4, do_sample=False)
    assert output.shape == (2, 64)
    assert cache.get_seq_length() == 63


#: Bits of each number, and of parameters and positions for each token and layer beside 2 x 64 numbers of one head.
EXPECTED = {
    "bf16 cache": (16, 0),
    "fp8 cache": (8, 0),
    "rotated 4-bit": (4, 2 * 32),
    "uniform 3-bit": (3, 32 + 32),
    "StreamingLLM-like 20%": (0.2 * 16, 0.2 * 32),
    "H2O-like 20%": (0.2 * 16, 0.2 * 32),
    "SnapKV-like 20%": (0.2 * 16, 0.2 * 32),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_are_those_of_the_form(model, name: str) -> None:
    with RECORDER.on(model):
        cache = replay(record(model, prompt(2, TOKENS)), pick([name])[1].build(model.config))
    bits, beside = EXPECTED[name]
    share = (bits * 2 * 64 + beside) / (16 * 2 * 64)
    # Channel parameters of the 3-bit keys and values come on top: 3 x 64 numbers of 16 bits.
    share += 3 * 64 * 16 / (TOKENS * 16 * 2 * 64) if name == "uniform 3-bit" else 0
    dense = half_precision_dense(model.config, 2, TOKENS)
    assert bytes_at_half_precision(cache) == pytest.approx(share * dense, rel=0.005)


def test_bytes_are_found_in_nested_forms() -> None:
    """As hqq keeps them: codes beside a dictionary of parameters and shapes."""
    parameters = {"scale": torch.ones(4), "shape": (1, 2), "zero": torch.ones(4).half()}
    layer = SimpleNamespace(stored=(torch.zeros(10, dtype=torch.uint8), parameters))
    assert bytes_at_half_precision(SimpleNamespace(layers=[layer])) == 10 + 4 * 2 + 4 * 2


def test_peers_are_listed_on_request() -> None:
    assert [each.name for each in contenders(with_peers=True)][-len(NAMES) :] == NAMES
    assert not set(NAMES) & {each.name for each in contenders()}
    assert [each.name for each in pick([], with_peers=True)] == [FULL, *NAMES]


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "transformers" in unavailable()["KIVI"]
    monkeypatch.setattr("tersor.kv.bench.peers.installed", lambda name: False)
    assert "pip install hqq" in unavailable()["QuantizedCache hqq"]
