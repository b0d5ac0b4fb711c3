"""`ZipR1Trainer`: trl's GRPO with rollouts, training and reference as ZipR1 wants them (arXiv 2504.18579).

Rollout and training forward run through the same ZipVL session, each row with its own threshold; the reference is
dense. What a row needs in the loss (threshold, gate, log-probabilities of the rollout) travels with it through trl's
shuffling and splitting as further tensors of the batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from tersor._compat import older_checkpointing_names
from tersor._errors import TersorError, WrongTypeError
from tersor.kv.engine.state import COMPLETION, THRESHOLDS, RowThresholds
from tersor.kv.engine.takeover import inner_model
from tersor.rl.config import ZipR1Config
from tersor.rl.data import prompt_inputs
from tersor.rl.rewards import Rewards, zipr1_rewards
from tersor.rl.rollout import budgets, multi_budget_generate
from tersor.rl.sparsity import effective_count, soft_count, soft_token_ratio
from tersor.rl.verifiers import Verifier, exact_match
from tersor.zoo.inspection import load_checked

#: Batches in a row whose log-probabilities may differ before a run is aborted.
PATIENCE = 3
#: Objective -> what of the attention is differentiated; nothing in the paper's estimator.
COUNTS = {"pathwise": soft_count, "entropy": effective_count}
#: Tensors of a batch that trl does not know.
ROW_TAU, ROW_GATE, ROW_LOGPROBS = "retention_threshold", "retention_gate", "rollout_logprobs"


class StopAtNaN(TrainerCallback):
    """Ends a training whose next update would leave no weight a number; what is saved stays as it is."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called with gradients that are about to be used.

        Raises:
            RuntimeError: If one is NaN or infinite.
        """
        if args.fp16:  # whose gradient scaler leaves such updates out, and goes on with a smaller scale
            return
        gradients = [each.grad for each in kwargs["model"].parameters() if each.grad is not None]
        if gradients and not bool(torch.stack([each.isfinite().all() for each in gradients]).all()):
            raise RuntimeError(
                f"the gradient of update {state.global_step + 1} is NaN or infinite; lower learning_rate or "
                "efficiency_weight, or train in float32, and start again: the last checkpoint is good"
            )


class ZipR1Trainer(GRPOTrainer):
    """GRPO whose policy reads prompts through ZipVL at several thresholds, and is rewarded for needing few tokens.

    The session stays on the policy until `close`, so that `evaluate` and `generate` run sparsely, too.

    Args:
        model: See `trl.GRPOTrainer`; a model in memory must have been saved, since the reference is read again.
        verifier: From an answer's text and the ``answer`` of its row to a score in [0, 1], right above 0.5; None where
            it cannot be judged.
        args: `ZipR1Config`.
        **trl: Further arguments of `trl.GRPOTrainer`, such as ``train_dataset``, ``processing_class`` and
            ``peft_config``. The data has columns ``prompt`` (messages), ``answer``, and ``image`` or ``images``.

    Raises:
        TypeError: For arguments of another class.
        ValueError: For data without its columns, or arguments that belong to ZipR1 itself.
    """

    args: ZipR1Config

    def __init__(self, model: Any, verifier: Verifier = exact_match, args: ZipR1Config | None = None, **trl: Any):
        if not isinstance(args, ZipR1Config):
            raise WrongTypeError(f"args must be a ZipR1Config, not {type(args).__name__}")
        if not callable(verifier) or isinstance(verifier, nn.Module):
            raise WrongTypeError("verifier must be a function of an answer's text and the wanted answer")
        for name in ("reward_funcs", "rollout_func", "tools", "environment_factory"):
            if trl.pop(name, None) is not None:
                raise TersorError(f"{name} belongs to ZipR1 itself; give a verifier")
        for name in ("train_dataset", "eval_dataset"):
            _check_columns(trl.get(name), name)
        if getattr(trl.get("peft_config"), "is_prompt_learning", False):
            kind = type(trl["peft_config"]).__name__
            raise TersorError(f"{kind} puts tokens of its own before the prompt, which ZipVL cannot count; use LoRA")
        self.verifier = verifier
        args.reward_weights = [1.0, args.efficiency_weight if args.objective == "literal" else 0.0]
        rewards: list[Any] = [self.performance, self.efficiency]
        with older_checkpointing_names():
            warnings.filterwarnings("ignore", message=".*rollout_func.*experimental")
            super().__init__(
                model=model,
                reward_funcs=rewards,
                args=args,
                rollout_func=lambda prompts, trainer: trainer.rollouts(prompts),
                **trl,
            )
        self.add_callback(StopAtNaN())
        # After trl has read the reference, whose attention it takes from the policy's configuration.
        self.session = args.recipe().on(inner_model(self.model)).enable()
        self._rewards: Rewards | None = None
        self._logprobs: list[list[float]] = []
        self._rows: RowThresholds | None = None
        self._expected: Tensor | None = None
        self._differing = 0

    def train(self, *args: Any, **options: Any) -> Any:
        """See `trl.GRPOTrainer`."""
        with older_checkpointing_names():
            return super().train(*args, **options)

    def close(self) -> None:
        """Give the policy its own attention back."""
        self.session.disable()

    def rollouts(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """trl's ``rollout_func``: answers, with the token ratio of each and the log-probabilities that it was drawn by.

        Args:
            prompts: Messages with their pictures, each question ``num_generations`` times.
        """
        template: Any = self.chat_template_kwargs
        made = prompt_inputs(self.processing_class, prompts, **template)
        inputs: dict[str, Any] = dict(super(GRPOTrainer, self)._prepare_inputs(made))  # on the policy's device
        rows = len(prompts)
        if self.model.training:
            tau = budgets(self.args.thresholds, self._group_size).repeat(rows // self._group_size)
        else:
            tau = torch.full((rows,), self.args.eval_threshold, dtype=torch.float64)
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ):
            before = self.session.state
            said = multi_budget_generate(self.session, inputs, tau, self.generation_config)
            self._check_sparse(before)
        self._logprobs, self._rows = said.logprobs, RowThresholds(tau)
        real = inputs["attention_mask"].bool()
        return {
            "prompt_ids": [ids[own].tolist() for ids, own in zip(inputs["input_ids"], real, strict=True)],
            "completion_ids": said.completions,
            "logprobs": None,
            ROW_TAU: tau.tolist(),
            "token_ratio": said.token_ratio.tolist(),
            "visual_token_ratio": said.visual_ratio.tolist(),
        }

    def performance(self, completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
        """``r_per`` of Eq. (9), a reward function of trl."""
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        scores = [self.verifier(text, wanted) for text, wanted in zip(texts, answer, strict=True)]
        self._rewards = zipr1_rewards(
            torch.tensor([torch.nan if each is None else each for each in scores], dtype=torch.float64),
            torch.tensor(columns["token_ratio"], dtype=torch.float64),
            self._group_size,
            efficiency_weight=self.args.efficiency_weight,
            gate=self.args.gate,
        )
        return scores

    def efficiency(self, token_ratio: Sequence[float], log_metric: Any, **columns: Any) -> list[float | None]:
        """``C * (1 - rho)`` of Eq. (9), a reward function of trl; reports what the whole reward came to."""
        rewards: Any = self._rewards  # `performance` comes first
        right = rewards.performance.reshape(-1, self._group_size) > 0.5
        log_metric("token_ratio", sum(token_ratio) / len(token_ratio))
        log_metric("zipr1_reward", rewards.total.nanmean().item())
        log_metric("groups/all_right", right.all(1).double().mean().item())
        log_metric("groups/all_wrong", (~right.any(1)).double().mean().item())
        return [None if math.isnan(each) else each for each in rewards.efficiency.tolist()]

    @property
    def _group_size(self) -> int:
        """Rollouts of a question in what runs now, training or evaluation."""
        size: Any = self.num_generations if self.model.training else self.num_generations_eval
        return int(size)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with older_checkpointing_names():
            out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rows, rewards = self._rows, self._rewards
        assert rows is not None and rewards is not None  # set by `rollouts` and `performance`
        self._rows, device = None, out["advantages"].device
        width = out["completion_ids"].shape[1]
        known = [nn.functional.pad(torch.tensor(own), (0, width - len(own))) for own in self._logprobs]
        out |= {ROW_TAU: rows.tau.to(device), ROW_GATE: rewards.gate.to(device)}
        out[ROW_LOGPROBS] = torch.stack(known).to(device)
        if self.args.correct_advantage == "nonneg":
            right = (rewards.performance > 0.5).to(device)
            out["advantages"] = torch.where(right, out["advantages"].clamp_min(0.0), out["advantages"])
        return out

    # Log-probabilities and loss.

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **options: Any
    ) -> Any:
        given = (model, input_ids, attention_mask, logits_to_keep)
        if model is self.ref_model:
            return super()._get_per_token_logps_and_entropies(*given, **options)
        if self._without_adapter():
            self.session.disable()
            try:
                return super()._get_per_token_logps_and_entropies(*given, **options)
            finally:
                self.session.enable()
        before = self.session.state
        with self._sparse_rows(input_ids, logits_to_keep):
            found = super()._get_per_token_logps_and_entropies(*given, **options)
        self._check_sparse(before)
        if self._expected is not None:
            self._check_identity(found[0].detach(), attention_mask[:, -logits_to_keep:].bool())
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        count = COUNTS.get(self.args.objective) if self.model.training and self.args.efficiency_weight else None
        self._rows = RowThresholds(inputs[ROW_TAU], differentiable=count is not None)
        self._expected = inputs[ROW_LOGPROBS] if self._weights_of_rollout() else None
        try:
            trl: Any = super()
            loss: Tensor = trl._compute_loss(model, inputs)
        finally:
            self._rows = self._expected = None
        if count is not None:
            saved = (inputs[ROW_GATE] * soft_token_ratio(self.session, count)).mean()
            self._metrics["train"]["soft_token_ratio"].append(self.accelerator.gather(saved.detach()).mean().item())
            loss = loss + self.args.efficiency_weight * saved.to(loss.dtype) / self.current_gradient_accumulation_steps
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Go on with the weights of a checkpoint.

        Of classes whose weights have other names in files than in memory, such as Qwen2.5-VL, transformers' own way
        finds none, and goes on with those that the model began with.
        """
        policy = self.session.model
        if self.model is not policy:  # adapters, whose names are the same
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        kept = load_checked(type(policy), resume_from_checkpoint, dtype=policy.dtype)
        policy.load_state_dict(kept.state_dict())

    @contextmanager
    def _sparse_rows(self, input_ids: Tensor, logits_to_keep: int) -> Iterator[None]:
        """Inside, every forward of the policy is told its rows' thresholds and where their prompts end.

        trl hands rows over in several parts and knows no keywords of ours, so a hook adds them to each part in turn.
        """
        completion = torch.zeros_like(input_ids, dtype=torch.bool)
        completion[:, -logits_to_keep:] = True
        rows: Any = self._rows
        start = 0

        def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal start
            part = slice(start, start + len(kwargs["input_ids"]))
            start = part.stop
            own = RowThresholds(rows.tau[part], rows.differentiable)
            return args, {**kwargs, COMPLETION: completion[part], THRESHOLDS: own}

        handle = self.session.model.register_forward_pre_hook(add, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def _without_adapter(self) -> bool:
        """Whether the policy runs as the reference now: with its adapters off, or with trl's copy of the first ones."""
        adapted: list[Any] = [each for each in self.session.model.modules() if isinstance(each, BaseTunerLayer)]
        return any(each.disable_adapters or "ref" in each.active_adapters for each in adapted)

    def _weights_of_rollout(self) -> bool:
        """Whether no update lies between the rollouts of this batch and its loss."""
        if not self.model.training:
            return True
        steps: Any = self.args.steps_per_generation
        since = self._step % (steps * self.num_iterations)
        return bool(since < self.current_gradient_accumulation_steps)

    def _check_sparse(self, before: Any) -> None:
        """Check that a sparse layer has read the prompts.

        Raises:
            RuntimeError: If none has.
        """
        if self.session.state is before or self.session.state is None or not self.session.state.records:
            raise RuntimeError(
                "no layer of the policy read its prompts sparsely, so this would not train ZipR1; something has taken "
                "the session's hooks off the model"
            )

    def _check_identity(self, logprobs: Tensor, mask: Tensor) -> None:
        """Check that the loss sees the model that the answers were drawn from (section 2.7).

        Raises:
            RuntimeError: If log-probabilities differ in several batches in a row.
        """
        expected: Any = self._expected
        difference = ((logprobs - expected).abs() * mask).sum() / mask.sum().clamp_min(1)
        half = logprobs.dtype != torch.float32 or self.args.bf16 or self.args.fp16
        tolerance = self.args.logprob_tolerance or (2e-2 if half else 1e-4)
        self._metrics["train" if self.model.training else "eval"]["logprob_difference"].append(difference.item())
        self._differing = self._differing + 1 if not difference <= tolerance else 0
        if self._differing >= PATIENCE:
            raise RuntimeError(
                f"log-probabilities of rollout and training differ by {difference.item():.2g} on average in "
                f"{PATIENCE} batches in a row, more than logprob_tolerance={tolerance}: the two do not run the same "
                "model; look for dropout, another precision, or a processor that gives other inputs"
            )


def _check_columns(data: Any, name: str) -> None:
    """Check a data set before anything is loaded.

    Raises:
        ValueError: If a column is missing.
    """
    columns = getattr(data, "column_names", None)
    if not isinstance(columns, list):
        return
    if missing := {"prompt", "answer"} - set(columns):
        raise TersorError(
            f"{name} has no column {' and no '.join(sorted(missing))}; it needs 'prompt' (messages), 'answer', and "
            f"'image' or 'images'; it has {columns}"
        )
