"""The model that tiny-judge's adapter is trained on: a small Qwen2-VL that tells what its pictures show."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from shared.run import Progress, Run, set_rate
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tersor.opening.intjudge.world import PROMPT, World
from tersor.opening.prompts import WORDS
from tersor.opening.scenes import COLOURS, PLACES, SHAPES, describe, draw
from tersor.zoo.processor import PictureProcessor

SPECIAL = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
#: Qwen's form of a conversation; roles and line ends are words.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
#: Pixels of a side: a picture of three by three cells is one token.
PATCH, MERGE = 8, 3
ASKED = "Describe"
IGNORED = -100


def words() -> list[str]:
    """All that is ever said, in a fixed order."""
    pictures = [f"<{slash}IMG_{n}>" for n in range(2 * 2) for slash in ("", "/")]
    tags = ["<INPUT>", "<OUTPUT_A>", "<OUTPUT_B>", *pictures]
    told = " ".join([*WORDS, PROMPT.system, PROMPT.question, *COLOURS, *SHAPES, *PLACES, ASKED])
    free = "system user assistant Draw and then a an : ( ) . ? ,"
    return list(dict.fromkeys([*tags, *free.split(), *re.findall(r"\w+", told)]))


def new_processor() -> PictureProcessor:
    """A word, a tag and a mark are a token each, and so is a picture."""
    known = {word: index for index, word in enumerate([*SPECIAL, "<unk>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"</?\w+>|\w+|[^\w\s]"), "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[SPECIAL[1], *SPECIAL[3:]],
        padding_side="left",
    )
    side = PATCH * MERGE
    image = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=1,
        size={"shortest_edge": side**2, "longest_edge": side**2},
        image_mean=[0.973, 0.973, 0.957],
        image_std=[0.3] * 3,
    )
    return PictureProcessor(image, fast, chat_template=CHAT_TEMPLATE)


def new_model(seed: int, processor: PictureProcessor, hidden: int = 128, layers: int = 4):
    """The untrained model, a pure function of ``seed``."""
    torch.manual_seed(seed)
    shared = {"initializer_range": 0.06}
    token, sections = processor.tokenizer, hidden // 24
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(token), "hidden_size": hidden, "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
            "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": token.eos_token_id,
            "pad_token_id": token.pad_token_id, **shared,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000.0,
                "mrope_section": [hidden // 8 - 2 * sections, sections, sections],
            },
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2, "num_heads": 4, "patch_size": PATCH,
            "spatial_merge_size": MERGE, "temporal_patch_size": 1, **shared,
        },
        image_token_id=processor.image_token_id, video_token_id=processor.video_token_id,
        vision_start_token_id=token.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=token.convert_tokens_to_ids("<|vision_end|>"), tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


@dataclass(frozen=True)
class Plan:
    """Pictures a conversation from few to many, each until their words are mostly right, in ``steps`` updates.

    ``solved``: share of right words over the last ten batches that moves on.
    """

    pictures: tuple[int, ...] = (1, 2, 4)
    sizes: tuple[int, ...] = (64, 64, 32)
    steps: int = 400
    solved: float = 0.93
    rate: float = 2e-3
    warmup: int = 30


SMOKE = Plan(steps=2, sizes=(4, 4, 4))


@dataclass
class Stages(Progress):
    """Progress with the stage, and the shares of right words of the last batches."""

    stage: int = 0
    recent: list[float] = field(default_factory=list)


class Trainer:
    """Model, optimizer and progress of the base; what it saves is enough to go on."""

    def __init__(self, plan: Plan, seed: int, state: Path) -> None:
        self.plan, self.seed = plan, seed
        self.processor = new_processor()
        self.model = new_model(seed, self.processor)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
        self.kept = Run(state, plan, seed, self.model, self.optimizer, Stages())
        self.progress = self.kept.progress

    def batch(self, rng: random.Random) -> tuple[dict[str, Tensor], Tensor]:
        """Conversations that tell what two of their pictures show, and labels of what they tell."""
        count, rows, labels, shown = self.plan.pictures[self.progress.stage], [], [], []
        token = self.processor.tokenizer
        ids = lambda text: token(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        for _ in range(self.plan.sizes[self.progress.stage]):
            scenes = [World.scene(rng) for _ in range(count)]
            row = ids(f"<|im_start|>user {ASKED} ")
            for number in range(count):
                row += ids(f"<IMG_{number}><|vision_start|><|image_pad|><|vision_end|></IMG_{number}>")
            row += ids("<|im_end|><|im_start|>assistant ")
            label = [IGNORED] * len(row)
            for number in rng.sample(range(count), min(2, count)):
                head, told = ids(f"<IMG_{number}> : "), ids(describe(scenes[number]))
                row, label = row + head + told, label + [IGNORED] * len(head) + told
            rows.append(row)
            labels.append(label)
            shown += [draw(scene) for scene in scenes]
        pictures = self.processor.image_processor(images=shown, return_tensors="pt")
        width = max(map(len, rows))
        filled = torch.tensor([row + [token.pad_token_id] * (width - len(row)) for row in rows])
        inputs = {
            "input_ids": filled, "attention_mask": (filled != token.pad_token_id).long(),
            "mm_token_type_ids": (filled == self.processor.image_token_id).int(), **pictures,
        }  # fmt: skip
        return inputs, torch.tensor([label + [IGNORED] * (width - len(label)) for label in labels])

    def rate(self) -> float:
        """Warm-up, constant, and a linear fall over the last two thirds."""
        plan, step = self.plan, self.progress.step
        return plan.rate * min(1.0, (step + 1) / plan.warmup) * max(0.02, min(1.0, 1.5 * (1 - step / plan.steps)))

    def train_step(self) -> tuple[float, float]:
        """One update; returns the loss and the share of right words."""
        inputs, labels = self.batch(random.Random(f"{self.seed}:{self.progress.step}"))
        self.model.train()
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        asked = labels[:, 1:] != IGNORED
        logits, wanted = self.model.lm_head(hidden[:, :-1][asked]), labels[:, 1:][asked]
        loss = F.cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        set_rate(self.optimizer, self.rate())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), (logits.argmax(-1) == wanted).float().mean().item()

    def run(self, *, look_every: int) -> None:
        """Train to the end of the plan, with a row of the curve every ``look_every`` steps."""
        progress = self.progress
        while progress.step < self.plan.steps:
            loss, right = self.kept.advance(self.train_step)
            progress.recent = [*progress.recent[-9:], right]
            mean = sum(progress.recent) / len(progress.recent)
            if progress.step % look_every == 0 or progress.step == self.plan.steps:
                self.kept.note({
                    "step": progress.step, "minutes": round(progress.seconds / 60, 1),
                    "pictures": self.plan.pictures[progress.stage], "loss": round(loss, 4), "right": round(mean, 3),
                })  # fmt: skip
            if len(progress.recent) == 10 and mean > self.plan.solved and progress.stage < len(self.plan.pictures) - 1:
                progress.stage, progress.recent = progress.stage + 1, []
            self.kept.save(now=progress.step == self.plan.steps)
