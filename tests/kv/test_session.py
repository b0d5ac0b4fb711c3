"""Sessions at their edges: wrappers, threads, failures half-way, and what would compress nothing in silence."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from small_configs import small_model
from tiny_models import SHAPE, build, prompt
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from tersor._compat import with_cache
from tersor._errors import UnsupportedError
from tersor.kv.session import Session
from tersor.kv.zipcache import ZipCache
from tersor.kv.zipvl import ZipVL

RAW = ZipCache(high_bits=16, low_bits=16, streaming_gap=8, min_tokens_to_compress=8)
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


class Delegating(nn.Module):
    """A wrapper whose generate is the inner model's."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "delegating": Delegating,
    "twice": lambda model: Delegating(Delegating(model)),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model.compile": compiled_in_place,
    "peft": lora,
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's, from its own code
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_session_on_a_wrapper_compresses_what_the_inner_model_caches(wrapper: str) -> None:
    model = WRAPPERS[wrapper](build("llama"))
    expected = model.generate(prompt(1, 40), **OPTIONS)
    with RAW.on(model) as session:
        output = model.generate(prompt(1, 40), **OPTIONS)
        assert all(layer.segments for layer in session.cache.compressed_layers())
    assert torch.equal(output, expected)
    assert torch.equal(model.generate(prompt(1, 40), **OPTIONS), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_plain_forward_of_a_wrapper_is_compressed_too() -> None:
    for wrapper in ("peft", "model.compile"):
        model = WRAPPERS[wrapper](build("llama"))
        with RAW.on(model) as session, torch.no_grad():
            model(prompt(1, 40))
            assert all(layer.segments for layer in session.cache.compressed_layers())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_releases_of_peft_that_call_past_the_hooks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(build("llama"))
    monkeypatch.setattr("tersor._compat.version", lambda name: "0.20.0" if name == "peft" else "5.24.0")
    with pytest.raises(ImportError, match=r"need peft >=0\.21, found 0\.20\.0: pip install"):
        RAW.on(model)
    RAW.on(build("llama"))


def test_what_holds_no_model_is_refused() -> None:
    for thing in (nn.Linear(2, 2), "tiny-lm", build("llama").model):
        with pytest.raises(TypeError, match="no model of transformers that generates"):
            ZipCache().on(thing)


@pytest.mark.parametrize("method", ["change", "register_forward_pre_hook", "register_forward_hook"])
def test_a_session_that_fails_half_way_leaves_the_model_as_it_was(method: str, monkeypatch) -> None:
    model = build("qwen2_5_vl")
    before = dict(vars(model)), model.config.to_dict()

    def fails(*args, **kwargs):
        raise OSError("half-way")

    from tersor.kv.engine.takeover import Takeover

    with monkeypatch.context() as patch:
        patch.setattr(Takeover if method == "change" else type(model), method, fails)
        with pytest.raises(OSError, match="half-way"):
            ZipCache().on(model).enable()
    assert "generate" not in vars(model) and not model._forward_pre_hooks and not model._forward_hooks
    assert before == (dict(vars(model)), model.config.to_dict())
    with ZipCache().on(model):
        pass


def test_another_thread_is_left_alone_and_told() -> None:
    model, seen = build("llama"), {}
    expected = model.generate(prompt(1, 40), **OPTIONS)

    def run() -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            seen["output"] = model.generate(prompt(1, 40), **OPTIONS)
            seen["logits"] = model(prompt(1, 40), use_cache=True)
            seen["told"] = [str(each.message) for each in told]

    with ZipVL(tau=0.5, min_tokens=0).on(model) as session:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert session.cache is None and session.state is None
    assert torch.equal(seen["output"], expected)
    for what in ("generate", "a forward of LlamaForCausalLM"):
        assert any(f"{what} runs in another thread than the one that entered" in line for line in seen["told"])


class IgnoresItsCache(LlamaForCausalLM):
    def forward(self, input_ids=None, cache=None, past_key_values=None, use_cache=None, **kwargs):
        return super().forward(input_ids, use_cache=False, **kwargs)


class ChangesItsKeys(LlamaForCausalLM):
    """Every layer's attention gets copies of what the cache returned."""

    def __init__(self, config):
        super().__init__(config)
        from transformers.models.llama import modeling_llama

        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(self._swap, with_kwargs=True)
        self._module = modeling_llama

    @staticmethod
    def _swap(module, args, kwargs):
        for name in ("cache", "past_key_values"):
            if kwargs.get(name) is not None:
                kwargs[name] = Copying(kwargs[name])
        return args, kwargs


class Copying:
    def __init__(self, cache):
        self.cache = cache

    def update(self, *args, **kwargs):
        keys, values = self.cache.update(*args, **kwargs)
        return keys.clone(), values.clone()


@pytest.mark.parametrize(
    ("model", "message"),
    [(IgnoresItsCache, "does not fill the cache"), (ChangesItsKeys, "changes keys and values that it cached")],
)
def test_a_model_that_would_compress_nothing_is_refused_in_its_first_forward(model, message: str) -> None:
    torch.manual_seed(0)
    net = model(LlamaConfig(**SHAPE)).eval()
    with ZipCache().on(net):
        with pytest.raises(NotImplementedError, match=message):
            net.generate(prompt(1, 40), **OPTIONS)
        with pytest.raises(NotImplementedError, match=message):
            net(prompt(1, 40))


def test_a_model_whose_generate_uses_no_cache_of_ours_is_refused(monkeypatch) -> None:
    net = build("llama")
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda self, inputs, **kwargs: inputs)
    with ZipCache().on(net), pytest.raises(UnsupportedError, match="does not fill the cache"):
        net.generate(prompt(1, 40))
    with ZipVL().on(net), pytest.raises(UnsupportedError, match="no prompt was read sparsely"):
        net.generate(prompt(1, 40))


def test_what_a_model_does_to_its_values_is_noticed_where_it_happens() -> None:
    """DiffLlama halves and joins its values; Doge makes its mask from them."""
    for model_type, name, message in (
        ("diffllama", "DiffLlamaForCausalLM", "changes its values after the cache"),
        ("doge", "DogeForCausalLM", "makes its mask from the values"),
    ):
        net = small_model(model_type, name)
        with RAW.on(net), pytest.raises(NotImplementedError, match=message):
            net.generate(torch.randint(3, 100, (1, 40)), **OPTIONS)


def test_sinks_are_computed_by_the_models_own_attention() -> None:
    net = small_model("gpt_oss", "GptOssForCausalLM")
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = net.generate(ids, **OPTIONS)
    with RAW.on(net) as session:
        assert torch.equal(net.generate(ids, **OPTIONS), expected)
        assert all(layer.segments for layer in session.cache.compressed_layers())
    assert net.config._attn_implementation == "eager"


@pytest.mark.parametrize("beams", [1, 3])
def test_layers_with_attention_and_a_linear_state_are_compressed(beams: int) -> None:
    net = small_model("falcon_h1", "FalconH1ForCausalLM")
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = net.generate(ids, **OPTIONS, num_beams=beams)
    with RAW.on(net) as session:
        assert torch.equal(net.generate(ids, **OPTIONS, num_beams=beams), expected)
        assert [len(layer.segments) > 1 for layer in session.cache.compressed_layers()] == [True] * 4
        session.cache.reset()
        assert torch.equal(net.generate(ids, **with_cache(session.cache), **OPTIONS, num_beams=beams), expected)


def test_a_cache_that_the_library_starts_anew_is_the_sessions(monkeypatch) -> None:
    """Phi-3 with long rotary factors reads everything again when it passes its original context."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = Phi3Config(
        **{**SHAPE, "max_position_embeddings": 256}, original_max_position_embeddings=48, sliding_window=None,
        rope_parameters={**factors, "original_max_position_embeddings": 48},
    )  # fmt: skip
    torch.manual_seed(0)
    net = Phi3ForCausalLM(config).eval()
    expected = net.generate(prompt(1, 40), **{**OPTIONS, "max_new_tokens": 20})
    with RAW.on(net) as session:
        output = net.generate(prompt(1, 40), **{**OPTIONS, "max_new_tokens": 20})
        assert session.cache.get_seq_length() == 59
        assert all(layer.segments for layer in session.cache.compressed_layers())
    assert torch.equal(output, expected)


def test_a_forward_without_a_cache_gets_a_compressed_one() -> None:
    net = build("llama")
    with RAW.on(net) as session, torch.no_grad():
        out = net(prompt(1, 40))
        step = net(prompt(1, 1), **with_cache(session.cache))
        assert session.cache.get_seq_length() == 41 and session.cache.layers[0].segments
    assert out.logits.shape[1] == 40 and step.logits.shape[1] == 1


def test_a_completion_mask_is_for_a_sparse_prefill() -> None:
    net = build("llama")
    with ZipCache().on(net), pytest.raises(ValueError, match="completion_mask is for a sparse prefill; zipcache reads"):
        net(prompt(1, 40), completion_mask=torch.zeros(1, 40, dtype=torch.bool))


def test_two_sessions_on_one_model_are_refused_whatever_wraps_it() -> None:
    net = build("llama")
    with ZipCache().on(net):
        with pytest.raises(RuntimeError, match="another session is active"):
            ZipCache().on(Delegating(net)).enable()
        assert isinstance(net.generate.__self__, Session)
    with ZipCache().on(net):
        pass


def test_the_model_assists_itself_although_layers_slide() -> None:
    """A cache that is made for drafts has to be one that takes them back."""
    net = build("gemma2")
    ids = prompt(1, 30).repeat(1, 2)
    expected = net.generate(ids, assistant_model=net, **OPTIONS)
    with RAW.on(net):
        assert torch.equal(net.generate(ids, assistant_model=net, **OPTIONS), expected)


def test_models_that_share_a_configuration_are_in_one_session_at_a_time() -> None:
    one = build("llama")
    other = LlamaForCausalLM(one.config)
    with ZipCache().on(one):
        with pytest.raises(RuntimeError, match="another model that shares it"):
            ZipCache().on(other).enable()
        copied = copy.deepcopy(one)
    assert one.config._attn_implementation == "sdpa" and "generate" not in vars(other)
    with pytest.raises(RuntimeError, match=r"another session|copied inside one"):
        ZipCache().on(copied).enable()


@pytest.mark.parametrize("more", [{"use_cache": True}, {"cache": True}])
def test_a_completion_mask_with_a_cache_is_refused(more: dict[str, bool]) -> None:
    net = build("llama")
    with ZipVL(min_tokens=0).on(net) as session:
        given = with_cache(session.method.cache(net.config)) if "cache" in more else more
        with pytest.raises(ValueError, match="leave the cache and use_cache out"):
            net(prompt(1, 40), completion_mask=torch.zeros(1, 40, dtype=torch.bool), **given)
