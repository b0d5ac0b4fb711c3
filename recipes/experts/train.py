"""Training of tiny-experts: the base on a mixture of skills, planted channels, and an expert on one skill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shared.run import Progress, Run, set_rate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tersor.bench.measure import seed_of
from tersor.experts.bench.skills import EOS, PAD, VOCABULARY, examples, rows_of
from tersor.experts.calibration import Batches, input_energy

SAVE_EVERY = 250


@dataclass(frozen=True)
class Size:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    positions: int = 512


@dataclass(frozen=True)
class Fit:
    """One training: AdamW whose rate rises over ``warmup`` steps and falls to 0 as a cosine."""

    skills: tuple[str, ...]
    steps: int
    rate: float
    batch: int = 64
    warmup: int = 100
    decay: float = 0.01
    pool: int = 40_000


def new_model(size: Size, seed: int) -> LlamaForCausalLM:
    """The untrained model, a pure function of its arguments."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config(size))


def new_classifier(size: Size, seed: int, labels: int) -> LlamaForSequenceClassification:
    """An untrained classifier of texts, a pure function of its arguments."""
    torch.manual_seed(seed)
    config = _config(size)
    config.num_labels = labels
    config.attention_dropout = 0.1
    return LlamaForSequenceClassification(config)


def _config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden, intermediate_size=size.ffn, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=size.positions,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip


def fit(model: LlamaForCausalLM, plan: Fit, *, seed: int, state: Path) -> Progress:
    """Train ``model`` on answers; goes on from ``state``. Each batch has the skills in equal parts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, weight_decay=plan.decay, betas=(0.9, 0.98))
    run = Run(state, plan, seed, model, optimizer, Progress())
    progress = run.progress
    pools = []
    if progress.step < plan.steps:
        pools = [rows_of(examples(skill, plan.pool, seed=seed, held_out=False)) for skill in plan.skills]

    def train_step() -> float:
        step = progress.step
        falling = (1 + math.cos(math.pi * step / plan.steps)) / 2
        set_rate(optimizer, plan.rate * min(1.0, (step + 1) / plan.warmup) * falling)
        ids, asked = _draw(pools, plan.batch, seed=seed, step=step)
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[asked[:, 1:]]), ids[:, 1:][asked[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    model.train()
    while progress.step < plan.steps:
        loss = run.advance(train_step)
        if progress.step % SAVE_EVERY == 0 or progress.step == plan.steps:
            print(*plan.skills, f"{progress.seconds:.0f} s", end=" ")
            run.note([progress.step, round(loss, 4)])
            run.save(now=True)
    model.eval()
    return progress


def _draw(pools: Sequence[tuple[Tensor, Tensor]], batch: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Rows of every pool, padded to one length; a pure function of its arguments."""
    generator = torch.Generator().manual_seed(seed_of(seed, step))
    longest = max(ids.shape[1] for ids, _ in pools)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, (ids, asked) in enumerate(pools):
        count = batch // len(pools) + (number < batch % len(pools))
        rows = torch.randint(len(ids), (count,), generator=generator)
        for place, tensor in enumerate((ids, asked)):
            parts[place].append(F.pad(tensor[rows], (0, longest - tensor.shape[1])))
    return torch.cat(parts[0]), torch.cat(parts[1])


def plant(model: LlamaForCausalLM, data: Batches, *, channels: int, factor: float, seed: int) -> dict[str, list[int]]:
    """Give ``channels`` input channels of every linear large activations without changing what the model computes.

    They are drawn from the half of the channels with the larger activations on ``data``: a channel that hardly says
    anything is none that a large model would have made large. At each of four sites of a layer the producer of a
    channel is multiplied by ``factor``, a power of two, and the columns that read it are divided by it. Fine-tuning
    then writes deltas of ordinary size into columns whose inputs are ``factor`` times as large, as in large language
    models.

    Returns:
        The channels by linear.
    """
    generator = torch.Generator().manual_seed(seed)
    linears = [name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]
    energies, _ = input_energy(model, [f"model.layers.{name}" for name in linears], data)
    planted: dict[str, list[int]] = {}
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        sites: tuple[tuple[Any, Any, tuple[str, ...]], ...] = (
            (layer.input_layernorm, attention, ("q_proj", "k_proj", "v_proj")),
            (attention.v_proj, attention, ("o_proj",)),
            (layer.post_attention_layernorm, mlp, ("gate_proj", "up_proj")),
            (mlp.up_proj, mlp, ("down_proj",)),
        )
        for producer, module, consumers in sites:
            part = "self_attn" if module is attention else "mlp"
            paths = [f"model.layers.{number}.{part}.{name}" for name in consumers]
            lively = energies[paths[0]].argsort(descending=True)[: len(producer.weight) // 2]
            drawn = torch.randperm(len(lively), generator=generator)[:channels]
            chosen = lively[drawn].sort().values
            with torch.no_grad():
                producer.weight[chosen] *= factor
                for path in paths:
                    model.get_submodule(path).weight[:, chosen] /= factor
            planted |= dict.fromkeys(paths, chosen.tolist())
    return planted


def as_record(plan: Fit, progress: Progress) -> dict[str, Any]:
    """A training as the lock file tells it."""
    return {**asdict(plan), "minutes": round(progress.seconds / 60, 2), "curve": progress.curve}
