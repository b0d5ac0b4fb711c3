"""Training of a control branch on clips with masks, by the paper's sections 3 and 4; the authors published none."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tersor import _atomic
from tersor._errors import TersorError
from tersor._images import gif_bytes
from tersor.drag.batches import Batch, Encoder, planned, seeded
from tersor.drag.controlnet import SpatioTemporalControlNetModel
from tersor.drag.data import Clip, Clips
from tersor.drag.features import check_record
from tersor.drag.injection import injected
from tersor.drag.objective import LOSS_MASKS, Noised, Scalings, draw_sigmas, masked_loss
from tersor.drag.pipeline import DragAnythingPipeline
from tersor.training.claim import alone, claim

#: Reports the update that is done, how many there are, and its loss.
OnStep = Callable[[int, int, float], None]
MIXED = ("no", "fp16", "bf16")
#: What of a branch is trained whole beside its adapters: all that begins at zero or at random.
_WHOLE = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
#: File of the losses in the folder of a run.
CURVE = "curve.json"
#: Denoising steps of a validation video.
_VALIDATED = 25


@dataclass(frozen=True, kw_only=True)
class DragTraining:
    """How to train; names as in diffusers' examples, and the paper's values where it gives any.

    Args:
        max_train_steps: Updates of the weights.
        train_batch_size: Clips of a process in a forward pass.
        gradient_accumulation_steps: Passes of an update.
        learning_rate: The highest one.
        lr_scheduler: A name of diffusers' `SchedulerType`.
        lr_warmup_steps: Updates in which the rate rises.
        adam_weight_decay: Of AdamW.
        max_grad_norm: Largest norm of the gradient.
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"``; the frozen UNet is kept in it.
        gradient_checkpointing: Compute blocks again in the backward pass.
        rank: Of adapters on the branch's attention, which then is trained with the encoders of the maps alone; 0
            trains all of the branch.
        loss_mask: One of `LOSS_MASKS`.
        entity_dropout: See `kept_numbers`; 0 as in the authors' data set.
        conditioning_dropout_prob: Chance to leave out the picture's embedding, its latents, or both.
        sigma_log_mean: Mean of the noise's logarithm, SVD's.
        sigma_log_std: Its standard deviation.
        fps: Frames a second of the clips.
        motion_bucket_id: SVD's amount of motion.
        noise_aug_strength: Standard deviation of the noise on the first frame.
        checkpointing_steps: Updates between checkpoints; 0 keeps the last one alone.
        checkpoints_total_limit: Checkpoints that are kept.
        validation_steps: Updates between videos of the first clip; 0 makes none.
        dataloader_num_workers: Processes that read clips.
        seed: Of all draws.

    Raises:
        TersorError: If a setting is outside its range.
    """

    max_train_steps: int
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 500
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    rank: int = 0
    loss_mask: str = "area"
    entity_dropout: float = 0.5
    conditioning_dropout_prob: float = 0.1
    sigma_log_mean: float = 0.7
    sigma_log_std: float = 1.6
    fps: int = 7
    motion_bucket_id: int = 128
    noise_aug_strength: float = 0.02
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int = 0
    dataloader_num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpoints_total_limit"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("rank", "lr_warmup_steps", "checkpointing_steps", "validation_steps", "dataloader_num_workers",
                     "adam_weight_decay", "noise_aug_strength", "sigma_log_std"):  # fmt: skip
            self._check(name, getattr(self, name) >= 0, "not negative")
        for name in ("learning_rate", "max_grad_norm"):
            self._check(name, 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("entity_dropout", "conditioning_dropout_prob"):
            self._check(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        schedules = [each.value for each in SchedulerType]
        for name, known in (("mixed_precision", MIXED), ("loss_mask", LOSS_MASKS), ("lr_scheduler", schedules)):
            self._check(name, getattr(self, name) in known, f"one of {[*known]}")
        self._check("conditioning_dropout_prob", self.conditioning_dropout_prob <= 1 / 3, "at most a third")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise TersorError(f"{name}={getattr(self, name)!r} must be {wanted}")


def train(
    pipe: DragAnythingPipeline,
    clips: Clips,
    plan: DragTraining,
    out: str | Path,
    *,
    facts: dict[str, Any] | None = None,
    on_step: OnStep = lambda step, steps, loss: None,
) -> list[float]:
    """Train the branch of a pipeline and save it to ``out / "controlnet"``; started again, it goes on where it was.

    With more updates in its plan, a finished run goes on from its end. Under ``accelerate launch`` every process calls
    it. All draws come from the seed and the number of the update, so that a run that was killed ends as one that was
    not.

    Args:
        pipe: Only ``pipe.controlnet`` is trained; it has an ``entity_feature_extractor``.
        clips: What to train on.
        plan: How to train.
        out: Folder of checkpoints, of the curve and of videos.
        facts: What else the run is about, such as where its data is; another run's folder is refused.
        on_step: Told of each update.

    Returns:
        The loss of each update.

    Raises:
        TersorError: Before training, if the pipeline and the clips do not fit, or the folder belongs to another run.
    """
    out, branch = Path(out), pipe.controlnet
    accelerator = Accelerator(
        gradient_accumulation_steps=plan.gradient_accumulation_steps, mixed_precision=plan.mixed_precision
    )
    _check(pipe, clips)
    with alone(out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            about = {"plan": asdict(plan), "clips": len(clips), "branch": _plain(branch.config), **(facts or {})}
            claim(out, about, grows=("plan", "max_train_steps"))
        accelerator.wait_for_everyone()
        return _Run(accelerator, pipe, clips, plan, out).finish(on_step)


class _Run:
    """One process of a training."""

    def __init__(
        self, accelerator: Accelerator, pipe: DragAnythingPipeline, clips: Clips, plan: DragTraining, out: Path
    ) -> None:
        self.accelerator, self.pipe, self.clips, self.plan, self.out = accelerator, pipe, clips, plan, out
        half = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[plan.mixed_precision]
        for part, dtype in ((pipe.vae, torch.float32), (pipe.image_encoder, half), (pipe.unet, half)):
            nn.Module.to(part.requires_grad_(False).eval(), accelerator.device, dtype)
        self.branch = nn.Module.to(pipe.controlnet, accelerator.device, torch.float32)
        self.trained = _to_train(self.branch, plan.rank)
        if plan.gradient_checkpointing:
            self.branch.enable_gradient_checkpointing()
            pipe.unet.enable_gradient_checkpointing()
        optimizer: Any = torch.optim.AdamW(self.trained, plan.learning_rate, weight_decay=plan.adam_weight_decay)
        self.schedule = get_scheduler(
            plan.lr_scheduler, optimizer, num_warmup_steps=plan.lr_warmup_steps, num_training_steps=plan.max_train_steps
        )
        self.model, self.optimizer = accelerator.prepare(self.branch, optimizer)
        accelerator.register_for_checkpointing(self.schedule)
        self.encoder = Encoder(
            pipe, plan.entity_dropout, plan.fps, plan.motion_bucket_id, plan.noise_aug_strength
        )  # fmt: skip
        self.losses: list[float] = []
        self.seconds, self.begun = 0.0, time.monotonic()
        if found := checkpoints(out):
            accelerator.load_state(str(found[-1]))
            kept = json.loads((found[-1] / CURVE).read_text(encoding="utf-8"))
            self.losses, self.seconds = kept["losses"], kept["seconds"]

    def finish(self, on_step: OnStep) -> list[float]:
        """Take the updates that are left and save the branch."""
        plan, main = self.plan, self.accelerator.is_main_process
        if not self.losses:
            self._validate(0)
        passes = plan.gradient_accumulation_steps
        begun, parts = len(self.losses) * passes, []
        batches = planned(
            len(self.clips), plan.train_batch_size, begun, plan.max_train_steps * passes, seed=plan.seed,
            rank=self.accelerator.process_index, ranks=self.accelerator.num_processes,
        )  # fmt: skip
        loader: Any = DataLoader(
            self.clips,  # type: ignore[arg-type]
            batch_sampler=[*batches],
            collate_fn=list,
            num_workers=plan.dataloader_num_workers,
        )
        for number, drawn in enumerate(loader, start=begun):
            parts.append(self._pass(number, drawn))
            if not self.accelerator.sync_gradients:
                continue
            self.losses.append(float(torch.stack(parts).mean()))
            parts = []
            if not math.isfinite(self.losses[-1]):
                raise TersorError(f"the loss of update {len(self.losses)} is no number; lower learning_rate")
            on_step(len(self.losses), plan.max_train_steps, self.losses[-1])
            if self._due(plan.checkpointing_steps):
                self._keep()
            if plan.validation_steps and self._due(plan.validation_steps):
                self._validate(len(self.losses))
        if main:
            save_branch(self.branch, plan.rank, self.out / "controlnet")
            self._write_curve(self.out)
        self.accelerator.wait_for_everyone()
        return self.losses

    def _pass(self, number: int, clips: list[Clip]) -> Tensor:
        """One forward and backward pass, and the update where it is due; returns the loss over all processes."""
        plan, generator = self.plan, seeded(self.plan.seed, number, self.accelerator.process_index)
        with self.accelerator.accumulate(self.model):
            batch = self.encoder(clips, generator)
            loss = batch_loss(self.pipe.unet, self.model, batch, plan, generator)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trained, plan.max_grad_norm)
            self.optimizer.step()
            if self.accelerator.sync_gradients:
                self.schedule.step()
            self.optimizer.zero_grad()
        found: Tensor = self.accelerator.gather(loss.detach()[None]).mean()
        return found

    def _write_curve(self, folder: Path) -> None:
        """The loss of each update, and the seconds that they took in all."""
        seconds = self.seconds + time.monotonic() - self.begun
        _atomic.write_text(folder / CURVE, json.dumps({"losses": self.losses, "seconds": round(seconds, 1)}) + "\n")

    def _due(self, every: int) -> bool:
        done = len(self.losses)
        return done == self.plan.max_train_steps or bool(every and done % every == 0)

    def _keep(self) -> None:
        """Write a checkpoint, whole or not at all, and remove the oldest ones."""
        folder = self.out / f"checkpoint-{len(self.losses)}"
        partial = folder.with_name(folder.name + ".partial")
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            save_branch(self.branch, self.plan.rank, partial / "controlnet")
            self._write_curve(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
            for old in checkpoints(self.out)[: -self.plan.checkpoints_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """A video of the first clip's scene; before the first update, too, so that what cannot be made fails then."""
        if not (self.plan.validation_steps and self.accelerator.is_main_process):
            return
        clip = self.clips[0]
        training = self.branch.training
        self.branch.eval()
        frames, height, width = clip.masks.shape
        latents = self.pipe(
            Image.fromarray(clip.frames[0]), clip.scene(), height, width, frames, fps=self.plan.fps,
            motion_bucket_id=self.plan.motion_bucket_id, noise_aug_strength=self.plan.noise_aug_strength,
            num_inference_steps=_VALIDATED, generator=seeded(self.plan.seed), output_type="latent",
        ).frames  # fmt: skip
        # The VAE stays in float32, whatever the UNet is in.
        pixels = self.pipe.decode_latents(latents.float(), frames, 8)
        made = self.pipe.video_processor.postprocess_video(pixels, "pil")[0]
        self.branch.train(training)
        _atomic.write_bytes(self.out / "validation" / f"step-{step:07}.gif", gif_bytes(made, 1000 // self.plan.fps))


def batch_loss(
    unet: nn.Module, branch: nn.Module, batch: Batch, plan: DragTraining, generator: torch.Generator
) -> Tensor:
    """The loss of one batch: noise is added, and UNet and branch together are to take it away.

    Args:
        unet: Stays as it is.
        branch: Gets the gradient.
        batch: See `Encoder`.
        plan: The noise and what the loss is over.
        generator: On the CPU.
    """
    device, chance = batch.latents.device, plan.conditioning_dropout_prob
    sigmas = draw_sigmas(len(batch.latents), plan.sigma_log_mean, plan.sigma_log_std, generator).to(device)
    known = Scalings(sigmas)
    noise = torch.randn(batch.latents.shape, generator=generator)
    # Three cases that exclude each other, as InstructPix2Pix has it (arXiv 2211.09800, section 3.2.1).
    drawn = torch.rand(len(batch.latents), generator=generator).to(device)
    told = batch.told * (drawn >= 2 * chance)[:, None, None]
    first = batch.first * ((drawn < chance) | (drawn >= 3 * chance))[:, None, None, None]
    noised = Noised.of(batch.latents, first, sigmas, noise)
    parameter = next(unet.parameters())
    residuals = branch(
        noised.seen, known.timestep, told.to(noised.seen), batch.ids, batch.gaussian, batch.entities, return_dict=False
    )  # fmt: skip
    with injected(unet, lambda *args, **keywords: residuals):
        out = unet(
            noised.seen.to(parameter.dtype), known.timestep.to(parameter.dtype), told.to(parameter.dtype),
            batch.ids.to(parameter.dtype), return_dict=False,
        )[0]  # fmt: skip
    return masked_loss(noised.predicted(out), batch.latents, known.weight, batch.masks, plan.loss_mask)


def _check(pipe: DragAnythingPipeline, clips: Clips) -> None:
    """Raise `TersorError` unless the branch can be trained on the clips; the first clip is tried."""
    if pipe.entity_feature_extractor is None:
        raise TersorError("the pipeline needs an entity_feature_extractor, such as tersor.drag.features has")
    if not len(clips):
        raise TersorError("there are no clips to train on")
    clip = clips[0]
    height, width = clip.masks.shape[1:]
    pipe._check_sizes(height, width)
    channels = 2 * pipe.controlnet.config.entity_embedding_out_channels[0]
    given = pipe.entity_feature_extractor.record
    if given["channels"] != channels:
        raise TersorError(f"the branch takes features of {channels} channels, the extractor gives {given['channels']}")
    check_record(pipe.controlnet.config.entity_features, given)


def _to_train(branch: SpatioTemporalControlNetModel, rank: int) -> list[nn.Parameter]:
    """What of the branch gets a gradient: all, or adapters and what has learned nothing yet."""
    branch.requires_grad_(rank == 0)
    branch.train()
    if rank:
        from tersor._lazy import require

        config: Any = require("peft", "rl").LoraConfig
        branch.add_adapter(config(r=rank, lora_alpha=rank, target_modules=[*_ATTENTION]))
        for name in _WHOLE:
            getattr(branch, name).requires_grad_(True)
    return [each for each in branch.parameters() if each.requires_grad]


def save_branch(branch: SpatioTemporalControlNetModel, rank: int, folder: Path) -> None:
    """Write the branch as `from_pretrained` reads it, with its adapters in its weights."""
    if rank:
        branch = copy.deepcopy(branch)
        branch.fuse_lora()
        branch.unload_lora()
    partial = folder.with_name(folder.name + ".partial")
    branch.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a training, the newest last."""
    found = {int(each.name.removeprefix("checkpoint-")): each for each in folder.glob("checkpoint-*[0-9]")}
    return [found[step] for step in sorted(found)]


def _plain(config: Any) -> dict[str, Any]:
    """A configuration without what diffusers writes of itself."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}
