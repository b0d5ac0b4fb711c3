"""A prompt that is recorded once and replayed, against reading it again."""

from __future__ import annotations

import pytest
import torch
from tiny_models import model, prompt
from transformers import DynamicCache

from tersor import MiniCache, ZipCache, compose
from tersor._compat import with_cache
from tersor.kv.recipe import Recipe
from tersor.kv.tape import RECORDER, record, replay

IDS, NEXT = prompt(2, 60), prompt(2, 5, seed=9)
CASES: dict[str, tuple[str, Recipe]] = {
    "mixed widths": ("llama", ZipCache()),
    "layers of which one is skipped": ("llama", ZipCache(skip_layers=(0,))),
    "merged layers": ("llama", compose(ZipCache(), MiniCache(start_layer=0, max_relative_error=2.0))),
    "sliding windows": ("gemma3", ZipCache()),
    "a key bias": ("qwen2", ZipCache(subtract_key_bias=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_cache_is_one_that_read_the_prompt(name: str) -> None:
    kind, recipe = CASES[name]
    net = model(kind)
    with RECORDER.on(net):
        tape = record(net, IDS)
        assert tape.tokens == IDS.shape[1]
        # The second replay finds the tape as the first one found it.
        caches = [replay(tape, recipe.cache(net.config)) for _ in range(2)]
    with recipe.on(net), torch.inference_mode():
        read = recipe.cache(net.config)
        net(IDS, **with_cache(read))
        logits = [net(NEXT, **with_cache(cache)).logits for cache in (read, *caches)]
    assert torch.equal(logits[1], logits[0])
    assert torch.equal(logits[2], logits[0])


def test_the_librarys_cache_takes_a_tape_too() -> None:
    net = model("llama")
    with RECORDER.on(net), torch.inference_mode():
        cache = replay(record(net, IDS), DynamicCache(config=net.config))
        logits = net(NEXT, **with_cache(cache)).logits
    with torch.inference_mode():
        expected = net(torch.cat([IDS, NEXT], 1)).logits[:, -NEXT.shape[1] :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_with_a_linear_state_are_refused() -> None:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"num_key_value_heads": 1, "vocab_size": 40, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8}
    net = FalconH1ForCausalLM(FalconH1Config(**settings, **small, head_dim=16)).eval()
    with RECORDER.on(net), pytest.raises(NotImplementedError, match="linear state"):
        record(net, torch.ones(1, 8, dtype=torch.int64))
