"""Models whose modules are laid out in other ways than Llama's: right in every row, or refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from tuned_models import logits, tuned

from tersor.cli import run
from tersor.experts.compress import compress_expert
from tersor.experts.config import DeltaConfig
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import ExpertHost, merge_expert
from tersor.experts.sources import Anatomy
from tersor.experts.verify import compare_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:no calibration data"),
    pytest.mark.filterwarnings("ignore:only .* calibration tokens"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # of PEFT
]
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 199,
}  # fmt: skip
IDS = torch.randint(3, 199, (3, 9), generator=torch.Generator().manual_seed(1))
ROUTED = {"full_modules": ("experts",)}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "transposed linears, learned positions": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=199)), {},
    ),
    "positions with an offset": (
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=199,
                max_position_embeddings=64, word_embed_proj_dim=32,
            )
        ), {},
    ),
    "an encoder": (lambda: BertForMaskedLM(BertConfig(**SHAPE, max_position_embeddings=64)), {}),
    "routed experts": (
        lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)), ROUTED,
    ),
    "routed experts, many": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SHAPE, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                head_dim=8,
            )
        ), ROUTED,
    ),
}  # fmt: skip


def made(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    build, settings = LAYOUTS[name]
    model = build().eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model, settings


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_a_batch_are_their_experts_whatever_the_layout(name: str) -> None:
    base, settings = made(name)
    host = ExpertHost(copy.deepcopy(base))
    merged = {None: base}
    for seed, (expert, bits) in enumerate((("math", 8), ("code", 2))):
        model = tuned(base, seed)
        delta = compress_expert(base, model, DeltaConfig(bits=bits, **settings), calibration=IDS)
        assert len(delta.manifest.modules) >= 8, "linears are packed"
        host.load_expert(expert, delta)
        merged[expert] = host.merge(expert)
        error = float((logits(merged[expert], IDS) - logits(model, IDS)).norm() / logits(model, IDS).norm())
        assert error < {8: 0.03, 2: 0.6}[bits], "the delta is the expert's, within its bits"
    rows = ["math", None, "code"]
    with host.use(rows) as model:
        found = logits(model, IDS)
    for row, expert in enumerate(rows):
        wanted = logits(merged[expert], IDS[row : row + 1])[0]
        assert torch.allclose(found[row], wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    if name != "an encoder":
        kwargs = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
        answers = host.generate(IDS, expert_names=rows, attention_mask=torch.ones_like(IDS), **kwargs)
        for row, expert in enumerate(rows):
            ones = torch.ones_like(IDS[:1])
            alone = merged[expert].generate(IDS[row : row + 1], attention_mask=ones, pad_token_id=0, **kwargs)
            assert answers[2 * row : 2 * row + 2].tolist() == alone.tolist()


def test_a_bias_by_distance_is_refused_by_name() -> None:
    base = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=199))
    host = ExpertHost(copy.deepcopy(base).eval())
    with pytest.raises(NotImplementedError, match=r"SelfAttention\.relative_attention_bias .*serve it on its own"):
        host.load_expert("math", compress_expert(base, tuned(base, 1)))
    assert not host.list_experts()
    with pytest.raises(NotImplementedError, match="without calibration"):
        compress_expert(base, tuned(base, 1), calibration=IDS)
    host.load_expert("code", compress_expert(base, tuned(base, 1, only="SelfAttention.q")))


def test_convolutions_are_no_routed_experts() -> None:
    class Mixed(GPT2LMHeadModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for block in self.transformer.h:
                block.conv = torch.nn.Conv1d(4, 4, 3)

    anatomy = Anatomy.of(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=199), Mixed)
    assert "transformer.h.0.conv.weight" in anatomy.others
    assert not anatomy.routed


def test_routed_experts_need_to_be_named() -> None:
    base, _ = made("routed experts")
    with pytest.raises(NotImplementedError, match=r"mlp\.experts\.gate_up_proj .*'experts' in full_modules"):
        compress_expert(base, tuned(base, 1))


def test_a_folder_of_routed_experts_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = made("routed experts")
    base.save_pretrained(tmp_path / "base")
    tuned(base, 1).save_pretrained(tmp_path / "expert")
    arguments = ["--base", tmp_path / "base", "--expert", f"math={tmp_path / 'expert'}", "--out", tmp_path / "bank"]
    command = [str(each) for each in ("experts", "pack", *arguments, "--bits", 8)]
    assert run(command) == 2
    assert "--full-modules" in capsys.readouterr().err
    assert run([*command, "--full-modules", "experts", "--json"]) == 0
    delta = ExpertDelta.from_pretrained(tmp_path / "bank" / "math")
    assert max(compare_weights(delta, tmp_path / "base", tmp_path / "expert", full=True).values()) < 0.05
    wanted = logits(tuned(base, 1), IDS)
    found = logits(merge_expert(MixtralForCausalLM.from_pretrained(tmp_path / "base").eval(), delta), IDS)
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.fixture(scope="module")
def lora(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter of a base beside it, and the model that it makes."""
    root = tmp_path_factory.mktemp("lora")
    base.save_pretrained(root / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(root / "adapter")
    model.merge_and_unload().save_pretrained(root / "merged")
    return root


def test_an_adapter_is_an_expert(base: Any, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", lora / "base", "--expert", f"math={lora / 'adapter'}", "--out", lora / "bank", "--json"]
    assert run([str(each) for each in ("experts", "pack", *arguments)]) == 0
    fact = json.loads(capsys.readouterr().out.splitlines()[-1])["math"]
    delta = ExpertDelta.from_pretrained(fact["folder"])
    assert {name.rpartition(".")[2] for name in delta.manifest.modules} == {"q_proj", "up_proj"}
    wanted = compress_expert(lora / "base", lora / "merged")
    for name, tensor in wanted.tensors.items():
        assert torch.allclose(delta.tensors[name].float(), tensor.float(), atol=1e-5)
    verify = ["verify", fact["folder"], "--base", lora / "base", "--expert", lora / "adapter", "--full", "--json"]
    assert run([str(each) for each in ("experts", *verify)]) == 0
    assert torch.equal(logits(base), logits(type(base).from_pretrained(lora / "base").eval())), (
        "the base is not written"
    )


def test_names_of_the_hub_are_fetched(base: Any, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"someone/base": lora / "base", "someone/expert": lora / "merged"}

    def fetch(name: str, **kwargs: Any) -> str:
        assert "*.safetensors" in kwargs["allow_patterns"]
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    delta = compress_expert("someone/base", "someone/expert", calibration=IDS)
    assert delta.manifest.base_model_name_or_path == "someone/base"
    compare_weights(delta, "someone/base", "someone/expert")
