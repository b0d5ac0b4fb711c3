"""A pipeline in the manner of diffusers: from classes or prompts to pictures or clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor._lazy import require
from tersor.grids.conditions import class_numbers
from tersor.grids.nar.heads import NARForImageGeneration, NAROutput
from tersor.grids.pixels import ImageTokenizer
from tersor.grids.sampling import Generators

_TYPES = ("pil", "np", "pt")


class VideoTokenizer(Protocol):
    """What turns ids of a video into frames."""

    def decode(self, ids: Tensor) -> Tensor:
        """Frames ``[batch, frames, channels, height, width]`` from 0 to 1, of ids ``[batch, *grid]``."""


@dataclass(frozen=True)
class FrameTokenizer:
    """An image tokenizer as one of videos, where each frame has a grid of its own."""

    tokenizer: ImageTokenizer

    @property
    def codebook_size(self) -> int:
        """Number of ids."""
        return self.tokenizer.codebook_size

    def encode(self, videos: Tensor) -> Tensor:
        """Ids ``[batch, frames, rows, columns]`` of ``[batch, frames, channels, height, width]``."""
        return self.tokenizer.encode(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])

    def decode(self, ids: Tensor) -> Tensor:
        """Frames ``[batch, frames, channels, height, width]``."""
        return self.tokenizer.decode(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])


@dataclass(frozen=True)
class TubeletTokenizer:
    """An image tokenizer as one of videos, where ``depth`` successive frames share a grid: they are its channels.

    With a `PatchTokenizer` of p by p pixels, a token is a block of ``depth`` frames times p times p.
    """

    tokenizer: ImageTokenizer
    depth: int

    @property
    def codebook_size(self) -> int:
        """Number of ids."""
        return self.tokenizer.codebook_size

    def encode(self, videos: Tensor) -> Tensor:
        """Ids ``[batch, frames / depth, rows, columns]`` of ``[batch, frames, channels, height, width]``.

        Raises:
            ValueError: If ``depth`` does not divide the number of frames.
        """
        batch, frames, _, height, width = videos.shape
        if frames % self.depth:
            raise TersorError(f"{frames} frames are not a multiple of depth={self.depth}")
        stacked = videos.reshape(batch * frames // self.depth, -1, height, width)
        return self.tokenizer.encode(stacked).unflatten(0, (batch, -1))

    def decode(self, ids: Tensor) -> Tensor:
        """Frames ``[batch, frames, channels, height, width]``."""
        stacked = self.tokenizer.decode(ids.flatten(0, 1))
        return stacked.unflatten(1, (self.depth, -1)).flatten(0, 1).unflatten(0, (len(ids), -1))


@dataclass(frozen=True)
class T5Features:
    """Text features of a T5 encoder, as NAR's text models were trained with (FLAN-T5-XL, 120 tokens).

    Args:
        encoder: The library's `T5EncoderModel`.
        tokenizer: The encoder's tokenizer.
        tokens: Tokens of a prompt; longer ones are cut.
    """

    encoder: Any
    tokenizer: Any
    tokens: int = 120

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features ``[batch, tokens, width]`` and mask ``[batch, tokens]``, padded on the left; "" has no tokens."""
        given = self.tokenizer(
            list(prompts), max_length=self.tokens, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        mask = given["attention_mask"]
        features = self.encoder(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
        mask = mask * torch.tensor([bool(each.strip()) for each in prompts], device=mask.device)[:, None]
        # The encoder's positions are relative, so that padding may lie anywhere: it goes to the front.
        order = mask.argsort(dim=-1, stable=True)
        return features.gather(1, order[..., None].expand_as(features)), mask.gather(1, order)


@dataclass(frozen=True)
class WordFeatures:
    """Text features of a small, closed vocabulary: one channel a word, so that a model's projection is its embedding.

    Args:
        words: All words that the model knows.
        tokens: Words of the longest prompt.
    """

    words: tuple[str, ...]
    tokens: int

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features ``[batch, tokens, words]`` and mask ``[batch, tokens]``, padded on the left; "" has no tokens.

        Raises:
            ValueError: If a word is unknown, or there are more words than ``tokens``.
        """
        # Of unit power over the channels, as normed features of an encoder are.
        features, power = torch.zeros(len(prompts), self.tokens, len(self.words)), len(self.words) ** 0.5
        mask = torch.zeros(len(prompts), self.tokens)
        for row, prompt in enumerate(prompts):
            found = prompt.lower().replace(",", " ").split()
            if unknown := [each for each in found if each not in self.words]:
                raise TersorError(f"prompt {prompt!r}: this model does not know {unknown}; its words are {self.words}")
            if len(found) > self.tokens:
                raise TersorError(f"prompt {prompt!r} has {len(found)} words; this model reads {self.tokens}")
            for place, word in enumerate(found, start=self.tokens - len(found)):
                features[row, place, self.words.index(word)] = power
                mask[row, place] = 1.0
        return features, mask


@dataclass
class NARPipelineOutput:
    """What `NARPipeline` returns.

    Args:
        images: Of an image model, else None: a list of PIL images, an array ``[n, height, width, channels]``, or a
            tensor ``[n, channels, height, width]``.
        frames: Of a video model, else None: a list of PIL images for each video, an array
            ``[n, frames, height, width, channels]``, or a tensor ``[n, frames, channels, height, width]``.
        forward_passes: Passes of each batch, the prefix's pass included.
    """

    images: Any = None
    frames: Any = None
    forward_passes: int = 0


class NARPipeline:
    """A model with its tokenizer, and for prompts a text encoder.

    Args:
        model: Its grid says whether it makes images or videos.
        tokenizer: An `ImageTokenizer`, or for videos a `VideoTokenizer` such as `FrameTokenizer`.
        text_encoder: Makes of prompts their features and mask, padded on the left, such as `T5Features`.

    Raises:
        ValueError: If the tokenizer has another number of ids than the model.
    """

    def __init__(
        self,
        model: NARForImageGeneration,
        tokenizer: ImageTokenizer | VideoTokenizer,
        text_encoder: Callable[[Sequence[str]], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        size = getattr(inner, "codebook_size", model.config.vocab_size)
        if size != model.config.vocab_size:
            raise TersorError(f"the tokenizer has {size} ids, the model {model.config.vocab_size}; they do not belong")
        self.model, self.tokenizer, self.text_encoder = model, tokenizer, text_encoder

    def __call__(
        self,
        class_labels: Sequence[int] | Sequence[str] | Tensor | int | str | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        **options: Any,
    ) -> NARPipelineOutput:
        """Make images or videos.

        Args:
            class_labels: A class or several, by number or by name, see `tersor.grids.conditions.class_numbers`.
            prompt: A text or several; "" is the null condition.
            guidance_scale: See `NARForImageGeneration.generate`.
            generator: See `NARForImageGeneration.generate`.
            **options: Further options of `NARForImageGeneration.generate`.
            num_images_per_prompt: Samples of each class or prompt.
            output_type: "pil", "np" or "pt"; values of the last two go from 0 to 1.

        Raises:
            ValueError: Before the first forward, if the request cannot be met.
            MissingExtraError: Without pillow.
        """
        if output_type not in _TYPES:
            raise TersorError(f"output_type={output_type!r} must be one of {_TYPES}")
        images = require("PIL.Image", "images") if output_type == "pil" else None
        out = self.model.generate(
            **self._condition(class_labels, prompt),
            guidance_scale=guidance_scale,
            num_return_sequences=num_images_per_prompt,
            generator=generator,
            return_dict_in_generate=True,
            **options,
        )
        assert isinstance(out, NAROutput)
        pixels = self.tokenizer.decode(out.sequences).float().clamp(0, 1)
        found = pixels if output_type == "pt" else _as_output(pixels, images)
        passes = out.forward_passes or 0
        if len(self.model.config.grid_size) == 3:
            return NARPipelineOutput(frames=found, forward_passes=passes)
        return NARPipelineOutput(images=found, forward_passes=passes)

    def _condition(self, labels: Any, prompt: str | Sequence[str] | None) -> dict[str, Any]:
        if labels is not None and prompt is not None:
            raise TersorError("give class_labels or a prompt, not both")
        if prompt is not None:
            if self.text_encoder is None:
                raise TersorError("a prompt needs a text encoder: NARPipeline(model, tokenizer, text_encoder=...)")
            features, mask = self.text_encoder([prompt] if isinstance(prompt, str) else list(prompt))
            return {"text_features": features, "text_mask": mask}
        if labels is None:
            return {}
        several = [labels] if isinstance(labels, (int, str)) else labels
        if isinstance(several, (list, tuple)) and all(isinstance(each, str) for each in several):
            several = class_numbers(several, self.model.config)
        return {"class_labels": several}


def _as_output(pixels: Tensor, images: Any) -> Any:
    """An array with the channels last, or nested lists of PIL images where there is PIL."""
    array = pixels.movedim(-3, -1).cpu().numpy()
    if images is None:
        return array
    if array.ndim == 5:
        return [[_picture(frame, images) for frame in video] for video in array]
    return [_picture(image, images) for image in array]


def _picture(image: Any, images: Any) -> Any:
    levels = (image * 255).round().astype("uint8")
    return images.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
