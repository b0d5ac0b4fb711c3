"""Model and training of tiny-vlm: seven stages from one tile on 4 x 4 cells to eight on 32 x 32."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shared.run import Progress, Run, set_rate
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from vlm.data import Batch, Layout, draw_batch, tile_processor
from vlm.grounding import draw_grounding, grounding_loss, read, use_grounded_attention

from tersor.kv.bench.tiles import FILLER, KINDS
from tersor.zoo.processor import PictureProcessor

#: Steps over which right answers are averaged, and after which they are looked at.
WINDOW = 25


@dataclass(frozen=True)
class Stage:
    """Pictures and questions of one stage.

    Args:
        grid: Cells on a side.
        tiles: Least and most tiles of a picture.
        shares: How often each of `KINDS` is asked.
        questions: Questions over one picture.
        fillers: Least and most words between colour and question mark.
        pictures: Pictures a batch.
        most: Steps after which it ends.
        solved: It ends earlier when every kind is right more often than this.
        rate: Learning rate.
        closed: Whether every tile points to another.
        practice: Whether early layers are blind in half of the steps only, and fillers are left out in half of them.
    """

    grid: int
    tiles: tuple[int, int]
    shares: tuple[float, float, float]
    questions: int
    fillers: tuple[int, int]
    pictures: int
    most: int
    solved: float = 1.0
    rate: float = 2e-3
    closed: bool = True
    practice: bool = True


MIXED = (0.3, 0.35, 0.35)
STAGES = (
    Stage(4, (1, 4), (1.0, 0.0, 0.0), 4, (0, 1), 32, 300, 0.97, rate=3e-3, closed=False, practice=False),
    Stage(5, (3, 8), (0.3, 0.4, 0.3), 6, (0, 3), 24, 500, 0.97, rate=3e-3, practice=False),
    Stage(8, (4, 8), MIXED, 6, (0, 16), 16, 75, 0.98),
    Stage(12, (4, 8), MIXED, 6, (8, 40), 8, 75, 0.975),
    Stage(16, (4, 8), MIXED, 5, (16, 66), 6, 60, 0.985),
    Stage(24, (4, 8), MIXED, 4, (40, 66), 4, 40, 0.985),
    Stage(32, (6, 8), MIXED, 4, (60, 66), 3, 75),
)


@dataclass(frozen=True)
class Plan:
    """Stages and what they teach beside answers.

    Args:
        stages: From small to large; the rate falls over the last.
        left_out: Whether fillers are left out of the early layers in half of the steps.
        turns: Share of the steps in which questions are later turns of a dialogue.
        taught: Share of the filler's words whose rows are told where to look and what to answer.
        warmup: Steps over which the rate rises.
    """

    stages: tuple[Stage, ...] = STAGES
    left_out: bool = True
    turns: float = 0.25
    taught: float = 1.0
    warmup: int = 30


SMOKE = Plan(
    stages=(
        Stage(4, (1, 4), (1.0, 0.0, 0.0), 2, (0, 1), 2, 2, rate=3e-3, closed=False, practice=False),
        Stage(5, (3, 8), MIXED, 2, (2, 3), 2, 4),
    )
)


@dataclass
class Stages(Progress):
    """Progress with the stage, its steps, and right answers of the last steps: right and asked, by kind."""

    stage: int = 0
    stage_step: int = 0
    recent: list[list[tuple[int, int]]] = field(default_factory=list)


def new_model(seed: int, processor: PictureProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model, a pure function of ``seed``. No block of the tower mixes cells: a cell knows itself only."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    # At this width the library's 0.02 leaves attention flat for the first thousand steps.
    shared = {"initializer_range": 0.08}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            **shared,
        },
        vision_config={
            "depth": 0, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 1, "temporal_patch_size": 1, "fullatt_block_indexes": [], "window_size": 8,
            "out_hidden_size": 64, **shared,
        },
        image_token_id=processor.image_token_id, video_token_id=processor.video_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def taught_tokens(processor: PictureProcessor, share: float) -> torch.Tensor:
    """Which tokens are told where to look and what to answer, bool ``[vocabulary]``: a share of the filler's words."""
    words = list(dict.fromkeys(FILLER))
    chosen = np.random.default_rng(0).permutation(words)[round(share * len(words)) :].tolist()
    taught = torch.ones(len(processor.tokenizer), dtype=torch.bool)
    taught[processor.tokenizer.convert_tokens_to_ids(chosen)] = False
    return taught


class Trainer:
    """Model, optimizer and progress; `run` trains to the end, and what it saves is enough to go on."""

    def __init__(self, plan: Plan, seed: int, state: Path) -> None:
        self.plan, self.seed = plan, seed
        self.processor = tile_processor()
        self.model = new_model(seed, self.processor)
        use_grounded_attention(self.model)
        self.taught = taught_tokens(self.processor, plan.taught)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
        self.kept = Run(state, plan, seed, self.model, optimizer, Stages())
        self.optimizer, self.progress = optimizer, self.kept.progress

    @property
    def done(self) -> bool:
        return self.progress.stage == len(self.plan.stages)

    def rate(self) -> float:
        """Warm-up, the stage's rate, and over the last stage a linear fall to a twentieth."""
        plan, progress = self.plan, self.progress
        stage = plan.stages[progress.stage]
        rate = stage.rate * min(1.0, (progress.step + 1) / plan.warmup)
        last = progress.stage == len(plan.stages) - 1
        return rate * (1 - 0.95 * progress.stage_step / stage.most) if last else rate

    def draw(self, rng: np.random.Generator) -> Batch:
        """The batch of this step."""
        stage = self.plan.stages[self.progress.stage]
        fillers = int(rng.integers(stage.fillers[0], stage.fillers[1] + 1))
        turns = stage.practice and bool(rng.random() < self.plan.turns)
        shares = {kind: share for kind, share in zip(KINDS, stage.shares, strict=True) if share}
        return draw_batch(
            self.processor, rng, Layout(stage.grid, stage.questions, fillers, turns), size=stage.pictures,
            tiles=stage.tiles, closed=stage.closed, shares=shares,
        )  # fmt: skip

    def train_step(self) -> tuple[float, list[tuple[int, int]]]:
        """One optimizer step; returns the loss, and right and asked questions by kind."""
        practice = self.plan.stages[self.progress.stage].practice
        rng = np.random.default_rng([self.seed, self.progress.step])
        batch = self.draw(rng)
        blind, left_out = (bool(rng.random() < 0.5) for _ in range(2))
        grounding = draw_grounding(
            batch.layout, len(self.model.model.language_model.layers), rng, blind=blind or not practice,
            left_out=left_out and practice and self.plan.left_out,
        )  # fmt: skip
        self.model.train()
        hidden = read(self.model, batch, grounding)
        taught = self.taught[batch.input_ids[:, batch.layout.rows()]]
        loss, right = self.answers(hidden, batch, taught)
        (loss + grounding_loss(grounding, batch, taught)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        set_rate(self.optimizer, self.rate())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), [
            (int(right[batch.kinds == kind].sum()), int((batch.kinds == kind).sum())) for kind in range(len(KINDS))
        ]

    def answers(self, hidden: torch.Tensor, batch: Batch, taught: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the answer at every taught row and of <eos> behind it, and which answers are right."""
        layout = batch.layout
        rows = torch.cat([layout.rows(), layout.rows()[:, -1:] + 1], 1)  # the last one is the answer's
        wanted = batch.answers[..., None].expand(-1, -1, rows.shape[1]).clone()
        wanted[..., -1] = self.processor.tokenizer.eos_token_id
        weight = torch.full(wanted.shape, 0.3)
        weight[..., :-1] *= taught
        weight[..., -2], weight[..., -1] = 1.0, 0.05
        logits = self.model.lm_head(hidden[:, rows])
        losses = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape)
        loss = (losses * weight).sum() / weight.sum()
        return loss, logits[:, :, -2].argmax(-1) == batch.answers

    def run(self) -> None:
        """Train to the end of the plan, with a row of training accuracy every `WINDOW` steps."""
        progress = self.progress
        while not self.done:
            stage = self.plan.stages[progress.stage]
            loss, right = self.kept.advance(self.train_step)
            progress.stage_step += 1
            progress.recent = [*progress.recent[1 - WINDOW :], right]
            shares = {
                kind: sum(row[index][0] for row in progress.recent) / asked
                for index, kind in enumerate(KINDS)
                if (asked := sum(row[index][1] for row in progress.recent))
            }
            looked = progress.stage_step % WINDOW == 0
            if looked or progress.stage_step == stage.most:
                self.kept.note({
                    "step": progress.step, "seconds": round(progress.seconds, 1), "grid": stage.grid,
                    "loss": round(loss, 4), **{kind: round(share, 3) for kind, share in shares.items()},
                })  # fmt: skip
            if progress.stage_step == stage.most or (looked and min(shares.values()) > stage.solved):
                progress.stage, progress.stage_step, progress.recent = progress.stage + 1, 0, []
            self.kept.save(now=self.done)
