"""Scores of tiny-vlm-small: right answers by kind of question."""

from __future__ import annotations

import torch
from shared.lock import share_of
from transformers import Qwen2_5_VLForConditionalGeneration
from vlm_small.tiles import KINDS, samples

from tersor.zoo.processor import PictureProcessor


@torch.no_grad()
def score(
    model: Qwen2_5_VLForConditionalGeneration, processor: PictureProcessor, *, grid: int, n: int, seed: int
) -> dict[str, dict[str, float]]:
    """Share of right answers by kind of question, with its Wilson interval."""
    model.eval()
    shares = {}
    for kind in KINDS:
        right = 0
        drawn = samples(n, kind=kind, seed=seed, grid=grid)
        for start in range(0, n, 32):
            part = drawn[start : start + 32]
            prompts = [f"<bos> <|vision_start|><|image_pad|><|vision_end|> {question.text}" for _, question in part]
            inputs = processor(text=prompts, images=[shown.pixels for shown, _ in part], return_tensors="pt")
            tokens = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1)
            answers = processor.tokenizer.convert_ids_to_tokens(tokens.tolist())
            right += sum(said == question.answer for said, (_, question) in zip(answers, part, strict=True))
        shares[kind] = share_of(right, n)
    return shares
