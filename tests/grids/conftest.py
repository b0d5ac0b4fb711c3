"""Tiny random models of every raster family, each with its own raster decoding to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.speculative.generation import SpeculativeOutput, speculative_generate
from tersor.grids.zipar.generation import ZipAROutput, zipar_generate

EOL = 55
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Sharp enough that a wrong position or a wrong key changes the greedy choice.
    "initializer_range": 0.3,
}


@dataclass
class Case:
    """A model, the grid of its images, inputs for it, and its own decoding.

    ``raster(inputs, guidance, **options)`` gives sequences in the layout of ZipAR's, greedy unless asked otherwise.
    """

    name: str
    model: PreTrainedModel
    grid: tuple[int, int]
    end_of_row: bool
    inputs: Callable[[int, bool], dict[str, torch.Tensor]]
    raster: Callable[..., torch.Tensor]
    #: Of the call, beside grid and window.
    options: dict[str, Any]
    pads: bool = True

    def zipar(self, inputs: dict[str, torch.Tensor], guidance: float | None = 1.0, **options: Any) -> ZipAROutput:
        return zipar_generate(self.model, inputs, **self._with_defaults(guidance, options))

    def speculative(
        self, inputs: dict[str, torch.Tensor], guidance: float | None = 1.0, **options: Any
    ) -> SpeculativeOutput:
        return speculative_generate(self.model, inputs, **self._with_defaults(guidance, options))

    def _with_defaults(self, guidance: float | None, options: dict[str, Any]) -> dict[str, Any]:
        default = {"do_sample": False, "return_dict_in_generate": True}
        if guidance is not None:
            default["guidance_scale"] = guidance
        return {**default, **self.options, **options}


def prompt(batch: int, padded: bool, tokens: int = 6, vocabulary: int = 50) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3], ids[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def llama(end_of_row: bool) -> Case:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=None, **SHAPE))
    rows, columns = 4, 5
    stride = columns + end_of_row

    def raster(inputs, guidance, **options):
        tokens = inputs["input_ids"].shape[1]

        def allowed(_, ids):
            last = (len(ids) - tokens) % stride == columns
            return [EOL] if last else list(range(60))

        return model.generate(
            **inputs,
            max_new_tokens=rows * stride,
            guidance_scale=guidance,
            prefix_allowed_tokens_fn=allowed if end_of_row else None,
            **{"do_sample": False, **options},
        )

    options = {"grid_size": (rows, columns), "eol_token_id": EOL if end_of_row else None}
    return Case(
        "llama_eol" if end_of_row else "llama", model.eval(), (rows, columns), end_of_row, prompt, raster, options
    )


def gpt2() -> Case:
    config = GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()

    def raster(inputs, guidance, **options):
        return model.generate(**inputs, max_new_tokens=20, guidance_scale=guidance, **{"do_sample": False, **options})

    return Case("gpt2", model, (4, 5), False, prompt, raster, {"grid_size": (4, 5)})


EMU3_MARKS = ["<|image start|>", "<|image token|>", "<|image end|>", "<|extra_200|>", "<|extra_201|>", "<image>"]


def emu3_model(**shape: Any) -> Emu3ForConditionalGeneration:
    names = ["<pad>", "<bos>", "<eos>", *"0123456789*", *EMU3_MARKS, *(f"<|visual token {i:06d}|>" for i in range(30))]
    vocabulary = {name: index for index, name in enumerate(names)}
    config = Emu3Config(
        vocabulary_map=vocabulary,
        text_config={
            "vocab_size": len(names),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **SHAPE,
            **shape,
        },
        vq_config={
            "codebook_size": 30,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
        },
    )
    torch.manual_seed(0)
    model = Emu3ForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def emu3_prompt(model: PreTrainedModel, rows: int, columns: int, batch: int, padded: bool) -> dict[str, torch.Tensor]:
    """As the processor writes it: text, then the size between the image's marks."""
    names = model.config.vocabulary_map
    size = [names[each] for each in ("<|image start|>", *f"{rows}*{columns}", "<|image token|>")]
    text = prompt(batch, padded, 4, 13)
    ids = torch.cat([text["input_ids"], torch.tensor(size).expand(batch, -1)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(text["attention_mask"], (0, len(size)), value=1),
    }


def emu3() -> Case:
    model = emu3_model()
    rows, columns = 3, 4
    names, visual = model.config.vocabulary_map, model.vocabulary_mapping.image_tokens
    closing = [names["<|extra_201|>"], names["<|image end|>"], 2]

    def raster(inputs, guidance, **options):
        tokens = inputs["input_ids"].shape[1]

        def allowed(_, ids):
            done = len(ids) - tokens
            if done >= rows * (columns + 1):
                return [closing[done - rows * (columns + 1)]]
            return [names["<|extra_200|>"]] if done % (columns + 1) == columns else visual

        return model.generate(
            **inputs,
            max_new_tokens=rows * (columns + 1) + 3,
            prefix_allowed_tokens_fn=allowed,
            guidance_scale=guidance,
            **{"do_sample": False, **options},
        )

    def inputs(batch, padded):
        return emu3_prompt(model, rows, columns, batch, padded)

    return Case("emu3", model, (rows, columns), True, inputs, raster, {})


def janus() -> Case:
    side = 4
    text = {**SHAPE, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    config = JanusConfig(
        text_config={"model_type": "llama", **text},
        vision_config={**small, "image_size": 32, "patch_size": 8, "num_image_tokens": side**2, "projection_dim": 32},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 40,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
            "initializer_range": 0.3,
        },
        image_token_id=57,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config.update(pad_token_id=0, bos_token_id=1)
    model.generation_config.generation_kwargs = {"boi_token_id": 58}

    def inputs(batch, padded):
        given = prompt(batch, padded)
        given["input_ids"][:, -1] = 58
        return given

    def raster(given, guidance, **options):
        options = {"do_sample": False, **options}
        if guidance != 1:
            return model.generate(**given, generation_mode="image", guidance_scale=guidance, **options)
        return janus_without_guidance(model, given["input_ids"], given["attention_mask"], side**2, **options)

    return Case("janus", model, (side, side), False, inputs, raster, {})


@torch.no_grad()
def janus_without_guidance(
    model, ids: torch.Tensor, mask: torch.Tensor, cells: int, *, do_sample: bool, temperature: float = 1.0
) -> torch.Tensor:
    """One plain forward a token: its own ``generate`` doubles the batch always, and fails without guidance."""
    embeddings, drawn = model.get_input_embeddings()(ids), []
    for _ in range(cells):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        hidden = model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions
        ).last_hidden_state[:, -1]
        logits = model.model.generation_head(hidden) / temperature
        drawn.append(torch.multinomial(logits.softmax(-1), 1) if do_sample else logits.argmax(-1, keepdim=True))
        embeddings = torch.cat([embeddings, model.prepare_embeddings_for_image_generation(drawn[-1])], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return torch.cat(drawn, dim=1)


def imagegpt() -> Case:
    config = ImageGPTConfig(vocab_size=31, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    torch.manual_seed(0)
    model = ImageGPTForCausalImageModeling(config).eval()
    model.generation_config.pad_token_id = 0

    def inputs(batch, padded):
        # Different images from the same start: the first samples would all be alike.
        start = torch.full((batch, 1), 30)
        return {"input_ids": start, "attention_mask": torch.ones_like(start)}

    def raster(given, guidance, **options):
        options = {"do_sample": False, **options}
        return model.generate(**given, max_new_tokens=16, guidance_scale=guidance, **options)

    return Case("imagegpt", model, (4, 4), False, inputs, raster, {}, pads=False)


def llamagen(condition: str) -> Case:
    text = condition == "text"
    config = LlamaGenConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_classes=5,
        condition=condition,
        condition_tokens=6 if text else 1,
        caption_size=10,
        grid_size=(4, 5),
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = LlamaGen(config).eval()

    def inputs(batch, padded):
        if not text:
            return {"class_labels": torch.arange(batch)}
        features = torch.randn(batch, 6, 10, generator=torch.Generator().manual_seed(batch))
        mask = torch.ones(batch, 6)
        if padded:
            mask[0, :4] = 0
        return {"text_features": features, "text_mask": mask}

    def raster(given, guidance, **options):
        return model.generate(**given, guidance_scale=guidance, **{"do_sample": False, **options})

    return Case(f"llamagen_{condition}", model, (4, 5), False, inputs, raster, {}, pads=text)


BUILDERS = {
    "llama": lambda: llama(False),
    "llama_eol": lambda: llama(True),
    "gpt2": gpt2,
    "emu3": emu3,
    "janus": janus,
    "imagegpt": imagegpt,
    "llamagen_class": lambda: llamagen("class"),
    "llamagen_text": lambda: llamagen("text"),
}


@pytest.fixture(scope="session")
def cases() -> Callable[[str], Case]:
    """Any case by name; each model is built once."""
    built: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in built:
            built[name] = BUILDERS[name]()
        return built[name]

    return get


@pytest.fixture(params=BUILDERS)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture(scope="session")
def large_emu3() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The real grid, 90 by 90, on the smallest model that has one."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = emu3_model(**sizes, num_key_value_heads=1, max_position_embeddings=9216)
    return model, emu3_prompt(model, 90, 90, 1, False)
