"""Training of NAR models on transformers' `Trainer`: schedules, samples as pictures, resuming after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from tersor import _atomic
from tersor._compat import checkpoint_activations
from tersor._errors import TersorError
from tersor._lazy import require
from tersor.grids.nar.tokens import Tokens
from tersor.training.claim import claim, last_checkpoint

SCHEDULES = ("step", "cosine", "constant")
#: Shares of the training after which the step schedule takes a fifth of the rate, as in the authors' code.
_DROPS, _DROP = (1 / 2, 2 / 3, 5 / 6), 0.2
_CURVE = "curve.json"


@dataclass(frozen=True, kw_only=True)
class NARTraining:
    """How to train; the defaults are the paper's for ImageNet but for ``batch_size``, which is 256 there.

    Args:
        steps: Optimizer steps.
        batch_size: Samples of each process in a step.
        learning_rate: The highest learning rate.
        schedule: ``"step"`` is a fifth of the rate after 1/2, 2/3 and 5/6 of the steps (the authors' images),
            ``"cosine"`` falls to ``final_share`` of it (their texts and videos), or ``"constant"``.
        warmup_steps: Steps in which the rate rises from 0.
        final_share: Share of the rate at the end of the cosine schedule.
        betas: Decay rates of AdamW's moments.
        weight_decay: Weight decay of AdamW.
        clip: Largest norm of the gradient.
        bfloat16: Autocast to bfloat16.
        gradient_checkpointing: Compute blocks again in the backward pass.
        save_every: Steps between checkpoints; 0 keeps none.
        sample_every: Steps between pictures of samples; 0 makes none.
        evaluate_every: Steps between held-out losses; 0 is at the end only.
        seed: Seeds the order of samples, dropout and the classes or texts that are left out.

    Raises:
        ValueError: If a setting is outside its range.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    schedule: str = "step"
    warmup_steps: int = 0
    final_share: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    bfloat16: bool = False
    gradient_checkpointing: bool = False
    save_every: int = 500
    sample_every: int = 0
    evaluate_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1:
            raise TersorError(f"steps={self.steps} and batch_size={self.batch_size} must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise TersorError(f"learning_rate={self.learning_rate} must be above 0")
        if self.schedule not in SCHEDULES:
            raise TersorError(f"schedule={self.schedule!r} must be one of {SCHEDULES}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise TersorError(f"warmup_steps={self.warmup_steps} must be from 0 to steps={self.steps}")
        if not 0 <= self.final_share <= 1 or not all(0 <= each < 1 for each in self.betas):
            raise TersorError(f"final_share={self.final_share} must be from 0 to 1, betas={self.betas} below 1")
        if self.weight_decay < 0 or self.clip <= 0:
            raise TersorError(f"weight_decay={self.weight_decay} must not be negative, clip={self.clip} above 0")
        if min(self.save_every, self.sample_every, self.evaluate_every) < 0:
            raise TersorError("save_every, sample_every and evaluate_every must not be negative; 0 is never")

    def rate(self, step: int) -> float:
        """Share of the learning rate that a step, counted from 0, takes."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "step":
            return rise * _DROP ** sum(step >= share * self.steps for share in _DROPS)
        if self.schedule == "cosine":
            fall = (1 + math.cos(math.pi * step / self.steps)) / 2
            return rise * (self.final_share + (1 - self.final_share) * fall)
        return rise


class _Trainer(Trainer):
    """The library's, with `NARTraining.rate` and batches that come whole."""

    def __init__(self, plan: NARTraining, **arguments: Any) -> None:
        super().__init__(data_collator=lambda batch: batch, **arguments)
        self.plan = plan
        # The models give a mean; one that takes any keyword would be handed a count to divide by.
        self.model_accepts_loss_kwargs = False

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        scheduler = LambdaLR(optimizer or self.optimizer, self.plan.rate)
        self.lr_scheduler: Any = scheduler
        return scheduler


class _Pictures(TrainerCallback):
    """Draws a sample sheet before the first step, every `sample_every` steps and at the end.

    The first one is there so that what cannot be drawn fails before the training.
    """

    def __init__(self, every: int, draw: Callable[[nn.Module], bytes], folder: Path) -> None:
        self.every, self.draw, self.folder = every, draw, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self._write(state, context["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._write(state, context["model"])

    def _write(self, state: Any, model: Any) -> None:
        if not state.is_world_process_zero:
            return
        model = getattr(model, "module", model)  # of a distributed model
        training = model.training
        picture = self.draw(model.eval())
        model.train(training)
        _atomic.write_bytes(self.folder / f"step-{state.global_step:07}.png", picture)


def train(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: NARTraining,
    out: str | Path,
    *,
    held_out: Tokens | None = None,
    draw: Callable[[nn.Module], bytes] | None = None,
    tokenizer: Path | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Train ``model`` in place and save it to ``out / "model"``; started again, it goes on where it was.

    With more steps in its plan, a finished run goes on from its last checkpoint, at the rates of the longer plan.

    Under ``accelerate launch`` or ``torchrun`` every process calls it, and each takes its share of the samples.

    Args:
        model: A `NARForImageGeneration`, or another model with the same forward.
        tokens: What to train on; of the model's grid and vocabulary.
        plan: How to train.
        out: Folder of checkpoints, of the curve and of pictures.
        held_out: Samples whose loss is taken every ``plan.evaluate_every`` steps and at the end.
        draw: Makes a PNG of samples of a model in eval mode; see `sample_sheet`.
        tokenizer: Folder of the image tokenizer, which is saved with the model.
        quiet: No progress bar and no lines.

    Returns:
        The curve: dictionaries with ``step`` and ``loss`` or ``eval_loss``, in nats a token.

    Raises:
        ValueError: Before training, if tokens have another grid or vocabulary, conditions are not the model's, or the
            folder belongs to another run.
        MissingExtraError: Without accelerate.
    """
    require("accelerate", "train")
    for part in (tokens, held_out):
        if part is not None:
            check_tokens(model, part)
    out = Path(out)
    arguments = _arguments(plan, out, held_out is not None, quiet)
    facts = {"plan": asdict(plan), "samples": len(tokens), "model": model.config.to_diff_dict()}
    claim(out, facts, write=arguments.process_index == 0, empty=False, grows=("plan", "steps"))
    callbacks = [_Pictures(plan.sample_every, draw, out / "samples")] if draw is not None and plan.sample_every else []
    trainer = _Trainer(
        plan, model=model, args=arguments, train_dataset=tokens, eval_dataset=held_out, callbacks=callbacks
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    if plan.gradient_checkpointing:
        checkpoint_activations(model, use_reentrant=False)
    checkpoint = last_checkpoint(out)
    if checkpoint is not None and checkpoint.name == f"checkpoint-{plan.steps}":
        # Resumed at its end, the trainer would take a step more.
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if held_out is not None and not any(
        "eval_loss" in row and row["step"] == plan.steps for row in trainer.state.log_history
    ):
        trainer.evaluate()
    wanted = ("loss", "eval_loss", "learning_rate")
    curve = [
        {"step": row["step"], **{name: row[name] for name in wanted if name in row}}
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    ]
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out / "model")
        if tokenizer is not None:
            for file in (*tokenizer.glob("*.json"), *tokenizer.glob("*.safetensors")):
                _atomic.write_bytes(out / "model" / "tokenizer" / file.name, file.read_bytes())
        _atomic.write_text(out / _CURVE, json.dumps(curve, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    return curve


def check_tokens(model: Any, tokens: Tokens) -> None:
    """Raise `ValueError` unless ``model`` can be trained on ``tokens``."""
    config = model.config
    if tokens.vocab_size != config.vocab_size:
        raise TersorError(f"the tokens have a vocabulary of {tokens.vocab_size}, the model one of {config.vocab_size}")
    if math.prod(tokens.grid_size) != math.prod(config.grid_size):
        raise TersorError(f"the tokens have a grid of {tokens.grid_size}, the model one of {tuple(config.grid_size)}")
    needed = {"class": {"class_labels"}, "text": {"text_features"}, "none": set()}[config.condition]
    given = set(tokens.conditions) - {"text_mask"}
    if needed != given:
        raise TersorError(
            f"the model's condition is {config.condition!r}, the token file has {sorted(given) or 'no conditions'}"
        )
    labels = tokens.conditions.get("class_labels")
    if labels is not None and int(labels.max()) >= config.num_classes:
        raise TersorError(f"class_labels go up to {int(labels.max())}, the model has {config.num_classes} classes")


def sample_sheet(decode: Callable[[Tensor], Tensor], *, seed: int = 0, **options: Any) -> Callable[[nn.Module], bytes]:
    """What `train` draws with: a PNG of samples, of a clip all frames side by side.

    Args:
        decode: Makes pixels of ids ``[n, *grid]``, as a tokenizer does.
        seed: Seed of the draws, the same in every picture.
        **options: Options of ``generate``, such as ``class_labels``.
    """
    from tersor.grids.drawing import as_png

    def draw(model: Any) -> bytes:
        generator = torch.Generator(model.device).manual_seed(seed)
        given = {name: each.to(model.device) if isinstance(each, Tensor) else each for name, each in options.items()}
        pixels = decode(model.generate(**given, generator=generator))
        columns = pixels.shape[1] if pixels.ndim == 5 else None
        return as_png(pixels.flatten(0, -4).cpu(), columns=columns)

    return draw


def _arguments(plan: NARTraining, out: Path, evaluates: bool, quiet: bool) -> TrainingArguments:
    every = plan.evaluate_every if evaluates else 0
    return TrainingArguments(
        output_dir=str(out),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        adam_beta1=plan.betas[0],
        adam_beta2=plan.betas[1],
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.clip,
        bf16=plan.bfloat16,
        save_strategy="steps" if plan.save_every else "no",
        save_steps=plan.save_every or plan.steps,
        save_total_limit=2,
        eval_strategy="steps" if every else "no",
        eval_steps=every or plan.steps,
        logging_steps=max(1, min(50, plan.steps // 10)),
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        seed=plan.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=quiet,
        log_level="error" if quiet else "passive",
    )
