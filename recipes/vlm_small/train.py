"""Model and training of tiny-vlm-small: grids from small to large, then two decays at the largest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shared.run import Progress, Run, set_rate
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from vlm_small.data import IGNORED, draw_batch, tile_processor
from vlm_small.evaluation import score

#: Weights in the loss of answers that are common or easy; the others weigh 1.
WEIGHTS = {"<eos>": 0.1, "0": 0.2, "1": 0.3}


@dataclass(frozen=True)
class Plan:
    """Grids from small to large, each until its look-ups are solved, then ``final`` steps at the largest.

    The rate falls to nearly nothing over those, and a second time, from a lower peak, over ``again`` more steps: large
    counts are told apart only at low rates.

    ``sizes``: pictures a batch, by grid. ``solved``: share of right look-ups over the last 30 batches that moves on.
    """

    grids: tuple[int, ...] = (4, 6, 8, 12, 16)
    sizes: tuple[int, ...] = (64, 48, 32, 24, 16)
    most_steps: int = 600
    final: int = 1700
    again: int = 1400
    peak_again: float = 0.4
    solved: float = 0.96
    turns: int = 4
    lookups: float = 0.3
    rate: float = 1.5e-3
    warmup: int = 100


SMOKE = Plan(grids=(4, 6), sizes=(4, 2), most_steps=3, final=2, again=2)


@dataclass
class Stages(Progress):
    """Progress with the stage, its steps, and the shares of right look-ups of the last batches."""

    stage: int = 0
    stage_step: int = 0
    recent: list[float] = field(default_factory=list)


def new_model(seed: int, vocabulary: int, image_token: int, video_token: int, eos: int, pad: int, hidden: int = 128):
    """The untrained model, a pure function of ``seed``."""
    torch.manual_seed(seed)
    # At this width the library's 0.02 leaves attention flat for the first thousand steps.
    shared = {"initializer_range": 0.08}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [hidden // 8 - 2 * (hidden // 24),
                hidden // 24, hidden // 24],
            },
            "bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad, **shared,
        },
        vision_config={
            "depth": 1, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 1, "temporal_patch_size": 1, "fullatt_block_indexes": [0], "window_size": 64,
            "out_hidden_size": hidden, **shared,
        },
        image_token_id=image_token, video_token_id=video_token, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


class Trainer:
    """Model, optimizer and progress; `run` trains to the end, and what it saves is enough to go on."""

    def __init__(self, plan: Plan, seed: int, state: Path) -> None:
        self.plan, self.seed, self.state = plan, seed, state
        self.processor = tile_processor()
        tokenizer = self.processor.tokenizer
        self.model = new_model(
            seed, len(tokenizer), self.processor.image_token_id, self.processor.video_token_id,
            tokenizer.eos_token_id, tokenizer.pad_token_id,
        )  # fmt: skip
        self.weights = torch.ones(len(tokenizer))
        for word, weight in WEIGHTS.items():
            self.weights[tokenizer.convert_tokens_to_ids(word)] = weight
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
        self.kept = Run(state, plan, seed, self.model, optimizer, Stages())
        self.optimizer, self.progress = optimizer, self.kept.progress

    @property
    def last_stage(self) -> bool:
        return self.progress.stage == len(self.plan.grids) - 1

    @property
    def done(self) -> bool:
        return self.last_stage and self.progress.stage_step >= self.plan.final + self.plan.again

    def rate(self) -> float:
        """Warm-up, then constant; in the last stage two linear decays, from the peak and from a share of it."""
        plan, step = self.plan, self.progress.stage_step
        if not self.last_stage:
            return plan.rate * min(1.0, (self.progress.step + 1) / plan.warmup)
        if step < plan.final:
            return plan.rate * max(0.02, min(1.0, 1.5 * (1 - step / plan.final)))
        return plan.rate * plan.peak_again * max(0.02, 1 - (step - plan.final) / plan.again)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns the loss and the share of right answers to look-ups."""
        progress, plan = self.progress, self.plan
        batch = draw_batch(
            self.processor, np.random.default_rng([self.seed, progress.step]), size=plan.sizes[progress.stage],
            grid=plan.grids[progress.stage], turns=plan.turns, lookups=plan.lookups,
        )  # fmt: skip
        self.model.train()
        hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        asked = batch.labels[:, 1:] != IGNORED
        logits, wanted = self.model.lm_head(hidden[:, :-1][asked]), batch.labels[:, 1:][asked]
        loss = F.cross_entropy(logits, wanted, weight=self.weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        set_rate(self.optimizer, self.rate())
        self.optimizer.step()
        self.optimizer.zero_grad()
        kind = batch.inputs["input_ids"].roll(2, 1)[:, 1:][asked]  # answers stand two tokens after their kind
        looked = kind == self.processor.tokenizer.convert_tokens_to_ids("color")
        return loss.item(), (logits.argmax(-1) == wanted)[looked].float().mean().item()

    def run(self, *, look_every: int, questions: int) -> None:
        """Train to the end of the plan, with a row of scores every ``look_every`` steps."""
        progress = self.progress
        while not self.done:
            loss, right = self.kept.advance(self.train_step)
            progress.stage_step += 1
            progress.recent = [*progress.recent[-29:], right]
            mean = sum(progress.recent) / len(progress.recent)
            enough = len(progress.recent) == 30 and mean > self.plan.solved
            if progress.step % look_every == 0:
                grid = self.plan.grids[progress.stage]
                scores = score(self.model, self.processor, grid=grid, n=questions, seed=1000 + progress.step)
                self.kept.note({
                    "step": progress.step, "minutes": round(progress.seconds / 60, 1), "grid": grid,
                    "loss": round(loss, 4), **{kind: each["share"] for kind, each in scores.items()},
                })  # fmt: skip
            if not self.last_stage and (enough or progress.stage_step >= self.plan.most_steps):
                progress.stage, progress.stage_step, progress.recent = progress.stage + 1, 0, []
            self.kept.save(now=self.done)
