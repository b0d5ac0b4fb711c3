"""`IntJudgeTrainer`: trl's `SFTTrainer` on pairs of answers, whose completions are the words of a verdict."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer

from tersor._compat import older_checkpointing_names
from tersor._errors import TersorError, WrongTypeError
from tersor.opening.intjudge.config import IntJudgeConfig
from tersor.opening.intjudge.losses import SIGNS, margin, ranking_loss, swap_loss
from tersor.opening.intjudge.pairs import SAID, Pair
from tersor.opening.judging.local import talk
from tersor.opening.prompts import WORDS, JudgePrompt, build

#: Columns that only this trainer reads: who wins, and how much the row counts in the ranking loss.
SIGN, WEIGHT = "verdict_sign", "verdict_weight"
_IGNORED = -100


class Rows:
    """Pairs as conversations with pictures, read when they are needed; both orders of a pair stand together.

    Args:
        pairs: To train on.
        prompt: What the judge is asked with.
        both_orders: Whether each pair makes two rows.
    """

    def __init__(self, pairs: Sequence[Pair], prompt: JudgePrompt, *, both_orders: bool) -> None:
        self.pairs, self.prompt, self.group, self.end = list(pairs), prompt, 2 if both_orders else 1, ""

    def dataset(self) -> Any:
        """The rows as trl takes them."""
        numbers = Dataset.from_dict({"row": range(self.group * len(self.pairs))})
        return numbers.with_transform(self._read)

    def _read(self, numbers: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self[number] for number in numbers["row"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def __getitem__(self, number: int) -> dict[str, Any]:
        pair = self.pairs[number // self.group]
        if number % self.group:
            pair = pair.swapped()
        asked = talk(build(self.prompt, pair.instance, pair.first, pair.second), self.prompt.side, self.prompt.mode)
        pictures = [part.pop("image") for message in asked for part in message["content"] if part["type"] == "image"]
        said = [{"role": "assistant", "content": [{"type": "text", "text": SAID[pair.label] + self.end}]}]
        sign, weight = SIGNS[pair.label]
        return {"images": pictures, "prompt": asked, "completion": said, SIGN: sign, WEIGHT: weight}


class PairSampler(torch.utils.data.Sampler[int]):
    """Pairs in an order of the seed and the epoch; the rows of a pair follow each other.

    Args:
        rows: What is drawn.
        seed: Of the order.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own, also when a run is resumed in it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows.group * len(self.rows.pairs)

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        group = self.rows.group
        for pair in torch.randperm(len(self.rows.pairs), generator=drawn).tolist():
            yield from range(group * pair, group * (pair + 1))


class IntJudgeTrainer(SFTTrainer):
    """Supervised training on verdicts, with a ranking and a swap-consistency loss where the settings want them.

    Args:
        model: Of transformers, one that reads pictures and writes text.
        pairs: To train on.
        args: `IntJudgeConfig`.
        prompt: What the judge is asked with; in use it must be the same.
        **trl: Further arguments of `trl.SFTTrainer`, such as ``processing_class`` and ``peft_config``.

    Raises:
        TypeError: For arguments of another class.
        ValueError: Where the tokenizer cannot tell the verdicts apart, or marks no end of an answer.
    """

    args: IntJudgeConfig

    def __init__(self, model: Any, pairs: Sequence[Pair], args: IntJudgeConfig, prompt: JudgePrompt, **trl: Any):
        if not isinstance(args, IntJudgeConfig):
            raise WrongTypeError(f"args must be an IntJudgeConfig, not {type(args).__name__}")
        self.rows = Rows(pairs, prompt, both_orders=args.both_orders)
        self.first = _first_tokens(trl["processing_class"].tokenizer)
        with older_checkpointing_names():
            super().__init__(model=model, args=args, train_dataset=self.rows.dataset(), **trl)
        trainer: Any = self
        trainer.data_collator = _Collator(trainer.data_collator)
        _end_answers(self.rows, trainer.data_collator, self.model, trl["processing_class"].tokenizer)

    def train(self, *args: Any, **options: Any) -> Any:
        """See `trl.SFTTrainer`."""
        with older_checkpointing_names():
            return super().train(*args, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        return PairSampler(self.rows, self.args.data_seed or self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of the verdict's words, and what the settings add to it; logits are made where words stand."""
        inputs = dict(inputs)
        labels, sign, weight = inputs.pop("labels"), inputs.pop(SIGN), inputs.pop(WEIGHT)
        places = (labels != _IGNORED).any(0).nonzero()[:, 0]
        outputs = model(**inputs, use_cache=False, logits_to_keep=places - 1)
        words = labels[:, places]
        sums = F.cross_entropy(outputs.logits.float().flatten(0, 1), words.flatten(), reduction="sum")
        loss = sums / (num_items_in_batch if num_items_in_batch is not None else (words != _IGNORED).sum())
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.args.rank_weight or self.args.swap_weight:
            loss = loss + self._extras(outputs.logits, words, sign, weight, num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def _extras(self, logits: Tensor, words: Tensor, sign: Tensor, weight: Tensor, accumulated: bool) -> Tensor:
        start = (words != _IGNORED).int().argmax(1)
        s = margin(logits, start, self.first)
        extra = self.args.rank_weight * ranking_loss(s, sign, weight)
        if self.args.swap_weight:
            extra = extra + self.args.swap_weight * swap_loss(s)
        return extra / (self.current_gradient_accumulation_steps if accumulated else 1)


class _Collator:
    """trl's collator, and the columns that it leaves out."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        columns = {name: torch.tensor([each[name] for each in examples]) for name in (SIGN, WEIGHT)}
        made: dict[str, Any] = self.collator([copy.copy(each) for each in examples])
        return made | columns


def _first_tokens(tokenizer: Any) -> tuple[int, int]:
    """First tokens of the two wins, once it is sure that no verdict begins with another."""
    verdicts = {words: tokenizer(words, add_special_tokens=False)["input_ids"] for words in WORDS}
    for one, two in itertools.permutations(verdicts, 2):
        if verdicts[one] == verdicts[two][: len(verdicts[one])]:
            raise TersorError(f"the tokenizer cannot tell {one!r} and {two!r} apart; take another model")
    first, second = (verdicts[words] for words in list(WORDS)[:2])
    if first[0] == second[0] or first[1:] != second[1:]:
        raise TersorError("the tokenizer makes the two wins differ in more than their first token; take another model")
    return first[0], second[0]


def _end_answers(rows: Rows, collator: _Collator, model: Any, tokenizer: Any) -> None:
    """Have every verdict end by a token that ends answers, so that a judge that writes knows where to stop."""
    known = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    said = tokenizer(rows[0]["completion"][0]["content"][0]["text"], add_special_tokens=False)["input_ids"]
    for end in ("", tokenizer.eos_token or ""):
        rows.end = end
        labels = collator([rows[0]])["labels"][0]
        kept = labels[labels != _IGNORED].tolist()
        if kept[: len(said)] != said:
            raise TersorError(
                "the chat template puts something between what a judge is asked and its verdict; give it one that ends "
                "a prompt by add_generation_prompt"
            )
        if ends & set(kept):
            return
    raise TersorError("neither the chat template nor the tokenizer ends an answer; give the tokenizer an eos_token")
