"""Every peer generates on a tiny Llama, holds the bytes that it should, and does what its paper says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import build, prompt
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from tersor.cli import bench
from tersor.kv.bench.contenders import FULL, bytes_at_half_precision, contenders, half_precision_dense, peers, pick
from tersor.kv.bench.peers import unavailable
from tersor.kv.bench.peers.cast import Cast
from tersor.kv.bench.peers.h2o import HeavyHitterSelection
from tersor.kv.bench.peers.rotated import Rotated, hadamard, rotate, rotate_back
from tersor.kv.bench.peers.snapkv import SnapSelection
from tersor.kv.bench.peers.stored import StoredLayer, stored_cache
from tersor.kv.bench.peers.streaming_llm import SinkSelection
from tersor.kv.bench.recall import RECORDER, record, replay
from tersor.kv.selection.base import Waiting
from tersor.kv.selection.probes import ProbeScores
from tersor.lowbit.codecs import affine_encode

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
    with RECORDER.on(model):
        output = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
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
    monkeypatch.setattr("tersor.kv.bench.peers.find_spec", lambda name: None)
    assert "pip install hqq" in unavailable()["QuantizedCache hqq"]


def test_the_command_adds_peers_and_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = ["kv", "--peers", "--contender", "uniform 4-bit", "--task", "needle", "--samples", "1"]
    result = CliRunner().invoke(bench, [*options, "--continuations", "0", "--context-bytes", "256"])
    assert result.exit_code == 0, result.output
    rows = [line.split("  ")[1].strip() for line in result.stdout.splitlines() if line.startswith("  ")]
    assert [row for row in rows if row in {FULL, "uniform 4-bit", *NAMES}] == [FULL, "uniform 4-bit", *NAMES]
    for name, reason in unavailable().items():
        assert f"{name} was not run: {reason[:40]}" in result.stdout


# -- caches in another form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 64, 128])
def test_hadamard_is_orthogonal_and_its_own_inverse(order: int) -> None:
    matrix = hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(96)


@pytest.mark.parametrize("dim", [1, 7, 64, 80])
def test_rotation_is_exact_at_16_bits(dim: int) -> None:
    """Read back and rounded to float16, tokens are what they were; scores do not change either."""
    tokens = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(dim))
    tokens = ((tokens * 64).round() / 64).half()  # on a grid that float16 holds and rounding errors cannot leave
    rotated = rotate(tokens)
    assert torch.equal((rotate_back(rotated, dim) * 64).round().half() / 64, tokens)
    scores, wide = rotated @ rotated.transpose(-1, -2), tokens.float()
    torch.testing.assert_close(scores, wide @ wide.transpose(-1, -2), rtol=1e-4, atol=1e-4)


def test_rotation_tames_an_outlier_channel() -> None:
    tokens = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(0))
    tokens[..., 5] += 40
    plain = affine_encode(tokens, 4, (-1,), valid=None, param_dtype=torch.float16).decode()
    rotated = Rotated(4).decode(Rotated(4).encode(tokens), 64)
    assert (rotated - tokens).abs().mean() < 0.5 * (plain - tokens).abs().mean()


def test_eight_bits_are_nearly_exact() -> None:
    tokens = torch.randn(1, 2, 9, 80, generator=torch.Generator().manual_seed(1))
    stored = Rotated(8).encode(tokens)
    assert stored[0].shape == (1, 2, 9, 128)
    torch.testing.assert_close(Rotated(8).decode(stored, 80), tokens, rtol=0, atol=0.02)


def test_beyond_the_range_of_fp8_is_its_largest_number() -> None:
    form = Cast(torch.float8_e4m3fn)
    tokens = torch.tensor([[[[1e4, -1e4, 1.0]]]])
    assert form.decode(form.encode(tokens), 3).tolist() == [[[[448.0, -448.0, 1.0]]]]


@pytest.mark.parametrize("form", [Cast(torch.bfloat16), Cast(torch.float8_e4m3fn), Rotated(4)])
def test_batch_operations_act_on_what_is_stored(form) -> None:
    layer, twin = StoredLayer(form), StoredLayer(form)
    keys, values = (torch.randn(3, 2, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layer.update(keys, values)
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    layer.crop(-2)
    twin.update(keys[[2, 0], :, :4], values[[2, 0], :, :4])
    new = torch.ones(2, 2, 1, 8)
    for read, expected in zip(layer.update(new, new), twin.update(new, new), strict=True):
        assert torch.equal(read, expected)
    assert layer.get_seq_length() == 5
    assert layer.get_mask_sizes(1) == (6, 0)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)
    layer.reset()
    assert layer.get_seq_length() == 0


def test_other_layers_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="sliding_attention"):
        stored_cache(build("gemma3").config, Rotated(4))


# -- evictions ----------------------------------------------------------------------------------------------------


def waiting_tokens(sums: torch.Tensor, *, segment: int = 0, valid: torch.Tensor | None = None) -> Waiting:
    """Tokens with the accumulated attention ``sums`` ``[kv_heads, tokens]``."""
    heads, tokens = sums.shape
    scores = ProbeScores(sums[None], torch.ones(1, tokens))
    return Waiting(torch.zeros(1, heads, tokens, 4), valid, scores, layer=0, segment=segment)


def kept(selection, waiting: Waiting) -> list[list[int]]:
    return selection.choose(waiting)[0].index[0].tolist()


def test_streaming_llm_keeps_sinks_and_the_newest() -> None:
    selection = SinkSelection(ratio=0.5, sinks=2)
    assert kept(selection, waiting_tokens(torch.zeros(1, 10))) == [[0, 1, 7, 8, 9]]
    # Sinks are the first tokens of the sequence, not of every segment, and not the padding before them.
    assert kept(selection, waiting_tokens(torch.zeros(1, 10), segment=1)) == [[5, 6, 7, 8, 9]]
    valid = torch.tensor([[False] * 2 + [True] * 8])
    assert kept(selection, waiting_tokens(torch.zeros(1, 10), valid=valid)) == [[2, 3, 8, 9]]


def test_h2o_keeps_the_newest_and_the_heavy_of_each_head() -> None:
    sums = torch.zeros(2, 12)
    sums[0, [1, 3, 5]], sums[1, [0, 2, 4]] = 1.0, 1.0
    assert kept(HeavyHitterSelection(ratio=0.5), waiting_tokens(sums)) == [[1, 3, 5, 9, 10, 11], [0, 2, 4, 9, 10, 11]]
    assert HeavyHitterSelection(ratio=0.5).probe_rows(7, layer=0, segment=0).tolist() == list(range(7))


def test_snapkv_pools_over_neighbours_and_keeps_its_window() -> None:
    sums = torch.zeros(2, 20)
    sums[0, 4], sums[1, 9] = 1.0, 1.0
    selection = SnapSelection(ratio=0.25, window=2, kernel=3)
    assert kept(selection, waiting_tokens(sums)) == [[3, 4, 5, 18, 19], [8, 9, 10, 18, 19]]
    assert selection.probe_rows(20, layer=0, segment=0).tolist() == [18, 19]
    assert not selection.probes_step(99, 100, layer=0, segment=1)
