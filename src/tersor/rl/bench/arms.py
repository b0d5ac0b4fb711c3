"""Ways to train tiny-vlm for fewer tokens: ZipR1's objectives, their parts alone, and supervised training.

Every way sees the same pictures and questions with the same thresholds, in as many updates of as many rows.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PrinterCallback

from tersor.kv.bench.tiles import KINDS, samples
from tersor.kv.engine.state import COMPLETION, THRESHOLDS, RowThresholds
from tersor.rl.bench.outcome import right_words
from tersor.rl.config import ZipR1Config
from tersor.rl.data import prompt_inputs, questions, with_pictures
from tersor.rl.policy import load_policy
from tersor.rl.rollout import budgets
from tersor.rl.sparsity import soft_token_ratio
from tersor.rl.trainer import ZipR1Trainer
from tersor.rl.verifiers import exact_match

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

#: Way -> how it differs from `Plan.config`.
ARMS: dict[str, dict[str, Any]] = {
    "literal": {"objective": "literal"},
    "accuracy only": {"objective": "literal", "efficiency_weight": 0.0},
    "pathwise": {},
    "entropy": {"objective": "entropy"},
    "pathwise, no gate": {"gate": "none"},
    "pathwise, no KL": {"beta": 0.0},
}
#: Supervised ways, in a loop of their own -> what their answers are learned from; the last has nothing to learn from.
SUPERVISED: dict[str, str] = {
    "given answers + ratio": "given",
    "own dense answers + ratio": "own",
    "ratio alone": "none",
}


@dataclass(frozen=True)
class Setting:
    """What a row of the table is about.

    Args:
        skip_layers: Layers that stay dense.
        checked: There are no answers to learn from, only a check, which takes the word of any tile on the way.
    """

    skip_layers: tuple[int, ...] = ()
    checked: bool = False

    def allows(self, arm: str) -> bool:
        """Whether there is what a way to train needs."""
        return not (self.checked and SUPERVISED.get(arm) == "given")


SETTINGS = {
    "every layer sparse": Setting(),
    "first layer dense": Setting((0,)),
    "a check, no answers": Setting(checked=True),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training, whatever its way.

    Args:
        steps: Updates.
        questions: Questions of an update; each is read at every threshold.
        thresholds: ZipVL's ``tau`` of a question's rollouts. Their ends differ in accuracy before the training, as the
            paper's estimator needs it; 1 keeps dense attention in use.
        eval_threshold: The one in use.
        efficiency_weight: Weight of saved tokens against a right answer.
        learning_rate: Of AdamW, after five updates of warm-up, falling to 0.
        beta: Weight of the divergence from the dense model.
        grid: Cells on a side of a picture.
        pictures: Different pictures.
    """

    steps: int = 80
    questions: int = 1
    thresholds: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.975, 1.0)
    eval_threshold: float = 0.975
    efficiency_weight: float = 0.25
    learning_rate: float = 4e-4
    beta: float = 0.1
    grid: int = 16
    pictures: int = 300

    def config(self, out: Path, seed: int, skip_layers: tuple[int, ...], **changes: Any) -> ZipR1Config:
        """The settings of a training by reinforcement."""
        own: dict[str, Any] = {
            "output_dir": str(out), "max_steps": self.steps, "seed": seed, "num_generations": len(self.thresholds),
            "per_device_train_batch_size": len(self.thresholds) * self.questions, "thresholds": [*self.thresholds],
            "eval_threshold": self.eval_threshold, "efficiency_weight": self.efficiency_weight,
            "learning_rate": self.learning_rate, "beta": self.beta,
            "lr_scheduler_type": "linear", "warmup_steps": 5, "max_completion_length": 1, "report_to": [],
            "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
            "zipvl": {"skip_layers": skip_layers, "min_tokens": 0},
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="beta=0")
            return ZipR1Config(**{**own, **changes})

    def data(self, seed: int, *, checked: bool = False) -> Dataset:
        """Questions to train on, as many of each kind."""
        return as_questions(-(-self.pictures // len(KINDS)), seed=10_000 + seed, grid=self.grid, checked=checked)


def as_questions(n: int, *, seed: int, grid: int, checked: bool = False) -> Dataset:
    """``n`` questions of each kind about tiles, see `tersor.kv.bench.tiles.samples` and `Setting`."""
    return questions(
        {
            "prompt": [{"role": "user", "content": asked.text}],
            "images": [Image.fromarray(shown.pixels)],
            "answer": right_words(shown, asked, checked=checked),
        }
        for shown, asked in samples(n, seed=seed, grid=grid)
    )


def train_arm(
    arm: str, source: Path, processor: Any, plan: Plan, *, seed: int, setting: Setting
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The model of ``source`` after one training, and what the trainer logged."""
    model, data, skip_layers = load_policy(str(source)), plan.data(seed, checked=setting.checked), setting.skip_layers
    with tempfile.TemporaryDirectory() as folder:
        if arm in SUPERVISED:
            log = supervise(model, processor, data, plan, SUPERVISED[arm], seed=seed, skip_layers=skip_layers)
            return model.eval(), log
        config = plan.config(Path(folder), seed, skip_layers, **ARMS[arm])
        trainer = ZipR1Trainer(model, exact_match, config, train_dataset=data, processing_class=processor)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            trainer.close()
        log = [row for row in trainer.state.log_history if "token_ratio" in row]
    return model.eval(), log


def supervise(
    model: PreTrainedModel,
    processor: Any,
    data: Dataset,
    plan: Plan,
    answers: str,
    *,
    seed: int,
    skip_layers: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Training with the same term for the ratio and no reward: no sampled answers, no gate.

    Args:
        model: Trained in place.
        processor: Its processor.
        data: Questions with one answer each.
        plan: The training.
        answers: ``"given"`` learns those of the data, ``"own"`` the probabilities of the dense model before the
            training, ``"none"`` the ratio alone.
        seed: Of the questions' order.
        skip_layers: Layers that stay dense.
    """
    teacher = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], plan.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, (plan.steps - step) / max(plan.steps - 5, 1))
    )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    count, log = len(plan.thresholds), []
    model.train()
    with plan.config(Path("unused"), seed, skip_layers).recipe().on(model) as session:
        for step in range(plan.steps):
            picked = [data[order[(step * plan.questions + index) % len(order)]] for index in range(plan.questions)]
            rows = [row for row in picked for _ in range(count)]
            inputs = prompt_inputs(processor, [with_pictures(row) for row in rows])
            budget = RowThresholds(budgets(plan.thresholds, len(rows)), differentiable=True)
            told = {THRESHOLDS: budget, COMPLETION: torch.zeros_like(inputs["input_ids"], dtype=torch.bool)}
            said = model(**inputs, **told, use_cache=False, logits_to_keep=1).logits[:, -1]
            ratio = soft_token_ratio(session).mean()
            loss = plan.efficiency_weight * ratio.to(said.dtype)
            if answers != "none":
                loss = loss + torch.nn.functional.cross_entropy(
                    said, _targets(answers, teacher, processor, rows, inputs)
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            log.append({"loss": loss.item(), "token_ratio": ratio.item()})
    return log


@torch.no_grad()
def _targets(answers: str, teacher: PreTrainedModel, processor: Any, rows: list[dict[str, Any]], inputs: Any) -> Tensor:
    """Tokens of the given answers, or the teacher's probabilities."""
    if answers == "given":
        return torch.tensor(processor.tokenizer.convert_tokens_to_ids([row["answer"][0] for row in rows]))
    probabilities: Tensor = teacher(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].softmax(-1)
    return probabilities
