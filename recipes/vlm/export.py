"""Processor, scores, checkpoint folder, lock file and model card of tiny-vlm."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tersor import _atomic
from tersor.bench.measure import machine, versions, wilson_interval
from tersor.kv.bench.tiles import CELL, COLOURS, KINDS, MOST_COUNTED, samples
from tersor.zoo.processor import PictureProcessor

if TYPE_CHECKING:
    from tiny_vlm import Trainer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
#: One user message with a picture and a question; the answer and <eos> follow.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
FINAL_SEED = 90210


def new_processor() -> PictureProcessor:
    """A processor whose words are one token each, and whose visual tokens are one cell each."""
    words = [*SPECIAL, *KINDS, *COLOURS, *(str(n) for n in range(MOST_COUNTED + 1))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
        padding_side="left",
    )
    image = Qwen2VLImageProcessorPil(
        patch_size=CELL, merge_size=1, temporal_patch_size=1, size={"shortest_edge": 1, "longest_edge": 10**6}
    )
    return PictureProcessor(image, fast, chat_template=CHAT_TEMPLATE)


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
        interval = wilson_interval(right, n)
        shares[kind] = {
            "share": round(interval.value, 4), "low": round(interval.low, 4), "high": round(interval.high, 4), "n": n,
        }  # fmt: skip
    return shares


def export(trainer: Trainer, *, out: Path, samples: int) -> dict[str, Any]:
    """Write the checkpoint folder ``out`` and return the lock: bfloat16 weights, scored as they will be loaded."""
    rounded = trainer.model.to(torch.bfloat16)
    rounded.generation_config.do_sample = False
    rounded.save_pretrained(out)
    trainer.processor.save_pretrained(out)
    grid = trainer.plan.grids[-1]
    scores = score(rounded.float(), trainer.processor, grid=grid, n=samples, seed=FINAL_SEED)
    lock = {
        "recipe": "recipes/tiny_vlm.py", "seed": trainer.seed, "steps": trainer.progress.step,
        "minutes": round(trainer.progress.seconds / 60, 1), "plan": asdict(trainer.plan), "grid": grid,
        "parameters": sum(p.numel() for p in rounded.parameters()), "scores": scores,
        "curve": trainer.progress.curve, "versions": versions(), "machine": machine(),
    }  # fmt: skip
    _atomic.write_text(out / "recipe.lock.json", json.dumps(lock, indent=1) + "\n")
    _atomic.write_text(out / "CARD.md", card(lock))
    return lock


def card(lock: dict[str, Any]) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    cells = lock["grid"] ** 2
    return "\n".join(
        [
            "# tiny-vlm",
            "",
            f"A `Qwen2_5_VLForConditionalGeneration` with {lock['parameters']:,} parameters that answers two kinds of "
            f"questions about a picture of {lock['grid']} x {lock['grid']} cells of 8 x 8 pixels, {cells} visual "
            "tokens: `color K` asks for the lower colour of the only tile whose upper colour is K, `count K` for the "
            "number of such tiles. A few cells are tiles, the rest is grey noise, so most visual tokens are "
            "redundant and it is known which are not. It knows nothing else.",
            "",
            "Weights are stored in bfloat16. The processor reads pictures with PIL; sides should be multiples of 8 "
            "pixels. An answer is one word and `<eos>`; another question may follow.",
            "",
            "## Scores on pictures that it never saw",
            "",
            "| question | right, % [95 % Wilson] | questions |",
            "|---|---:|---:|",
            *(
                f"| {kind} | {100 * each['share']:.1f} [{100 * each['low']:.1f}, {100 * each['high']:.1f}] "
                f"| {each['n']:,} |"
                for kind, each in lock["scores"].items()
            ),
            "",
            "## Training",
            "",
            f"`python recipes/tiny_vlm.py --out OUT`, seed {lock['seed']}, {lock['steps']:,} steps in "
            f"{lock['minutes']:.0f} minutes on {lock['machine']['cores']} cores ({lock['machine']['cpu']}). Pictures "
            f"are generated, 1 to 6 tiles each, with {lock['plan']['turns']} questions in a row; the grid grows when "
            "look-ups are solved.",
            "",
            "| step | minutes | grid | loss | color | count |",
            "|---:|---:|---:|---:|---:|---:|",
            *(
                f"| {row['step']} | {row['minutes']} | {row['grid']} | {row['loss']:.4f} | {row['color']:.2f} "
                f"| {row['count']:.2f} |"
                for row in lock["curve"]
            ),
            "",
            "Generated data; Apache-2.0.",
            "",
        ]
    )
