"""A vision-language model on this machine as a judge: the log-probability of each of the four verdicts.

Nothing is generated, so nothing can fail to be read. The four need not add up to one: how much probability they have
together says whether the model is a judge at all, and is printed.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor.opening.judging.adapter import adapter_folder, load_adapter, read_facts
from tersor.opening.judging.base import Question, Record, Reply
from tersor.opening.pictures import Mode, fitted, read_rgb
from tersor.opening.prompts import LEAST_SIDE, WORDS, JudgePrompt, Message, build
from tersor.zoo import loading

#: Batches that are read ahead, to put questions of similar length together.
_WINDOW = 8


@dataclass(frozen=True)
class _Encoded:
    """A question as the model reads it: tensors of one row, and its number of tokens."""

    question: Question
    inputs: dict[str, Tensor]

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


def talk(message: Message, side: int, mode: Mode) -> list[dict[str, Any]]:
    """The message as a chat template takes it, with pictures of at most ``side`` pixels a side."""
    parts = [
        {"type": "text", "text": each}
        if isinstance(each, str)
        else {"type": "image", "image": fitted(read_rgb(each), side, mode)}
        for each in message.parts
    ]
    system = {"role": "system", "content": [{"type": "text", "text": message.system}]}
    return [system, {"role": "user", "content": parts}]


class LocalJudge:
    """Scores the four verdicts after the prompt, several questions at once.

    Args:
        model: Of transformers, one that reads pictures and writes text.
        processor: Of the model.
        prompt: What it is asked with.
        name: In its id.
        batch: Questions at once; each is four rows.
        padding: Side on which shorter rows are filled; the scores are the same.
        temperature: Divides the log-probabilities before they become a probability; the label stays the same.
    """

    def __init__(
        self, model: Any, processor: Any, prompt: JudgePrompt | None = None, *, name: str, batch: int = 4,
        padding: Literal["left", "right"] = "left", temperature: float = 1.0,
    ) -> None:  # fmt: skip
        self.model, self.processor, self.prompt = model.eval(), processor, prompt or JudgePrompt()
        self.batch, self.padding, self.temperature = batch, padding, temperature
        self.id, self.prompt_hash, self.prompt_text = f"hf:{name}", self.prompt.hash, self.prompt.text
        self.settings: dict[str, Any] = {"batch": batch, "dtype": str(model.dtype), "temperature": temperature}
        self.masses: list[float] = []
        tokenizer = processor.tokenizer
        self.verdicts = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in WORDS]
        for one, two in itertools.permutations(self.verdicts, 2):
            if one == two[: len(one)]:
                raise TersorError(f"{name} cannot be a judge: its tokenizer cannot tell {' and '.join(WORDS)} apart")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        text = getattr(model.config, "text_config", None) or model.config
        self.most_tokens = getattr(text, "max_position_embeddings", None) or 2**31

    @classmethod
    def from_pretrained(
        cls, location: str, prompt: JudgePrompt | None = None, *, device: str = "auto", batch: int = 4
    ) -> LocalJudge:
        """The judge in a checkpoint: a folder, a hub name or a zoo name, or in a folder of `tersor train intjudge`.

        A trained judge is asked with the words that it was trained with, unless ``prompt`` is given.

        Raises:
            TersorError: If it cannot be loaded, or reads no pictures.
        """
        if (folder := adapter_folder(location)) is not None:
            facts = read_facts(folder)
            model, processor = load_adapter(folder, device)
            return cls(
                model, processor, prompt or facts.prompt, name=location, batch=batch, temperature=facts.temperature
            )
        found = loading.resolve(location)
        if not loading.is_multimodal(found) and found != location:
            raise TersorError(f"--judge hf:{location} reads no pictures; give a vision-language model")
        model, _ = loading.load(found, device)
        return cls(model, loading.load_processor(found), prompt, name=location, batch=batch)

    def run(self, questions: Iterator[Question], record: Record) -> None:
        """See `tersor.opening.judging.base.Judge`."""
        while window := list(itertools.islice(questions, _WINDOW * self.batch)):
            able = []
            for question in window:
                encoded = self._encode(question)
                if encoded is None:
                    record(question, Reply("too_large", text=f"more than {self.most_tokens} tokens"))
                else:
                    able.append(encoded)
            able.sort(key=lambda each: each.length)
            for first in range(0, len(able), self.batch):
                part = able[first : first + self.batch]
                began = time.monotonic()
                scores = self._scores(part)
                seconds = (time.monotonic() - began) / len(part)
                for each, row in zip(part, scores, strict=True):
                    record(each.question, self._reply(row, seconds, each.length))

    def remarks(self) -> list[str]:
        """The probability that the four verdicts had together."""
        if not self.masses:
            return []
        middle = statistics.median(self.masses)
        said = f"log of the probability of all four verdicts together: median {middle:.2f} (n={len(self.masses)})"
        return [said + ("; a judge that gives them so little is none" if middle < -5 else "")]

    def scores(self, questions: Iterable[Question]) -> Tensor:
        """Log-probabilities ``[questions, 4]`` of the verdicts in the order of `WORDS`."""
        encoded = [self._encode(each) for each in questions]
        if not all(encoded):
            raise TersorError("a question is too large for the judge")
        return self._scores([each for each in encoded if each is not None])

    def _reply(self, row: Tensor, seconds: float, length: int) -> Reply:
        mass = row.logsumexp(0)
        chances = (row / self.temperature).softmax(0)
        self.masses.append(mass.item())
        words = list(WORDS)
        values = dict(zip(words, (round(each, 5) for each in row.tolist()), strict=True))
        said = json.dumps({"log_probabilities": values, "log_mass": round(mass.item(), 5)})
        better = sum(chances[place].item() for place, each in enumerate(words) if WORDS[each] in ("A", "Tie(A)"))
        label = WORDS[words[int(row.argmax())]]
        return Reply("ok", label, probability=better, text=said, latency=seconds, tokens_in=length, tokens_out=0)

    def _encode(self, question: Question) -> _Encoded | None:
        """The question with pictures as large as its tokens allow; None where the smallest are too large."""
        message = build(self.prompt, question.instance, question.first, question.second)
        side, room = self.prompt.side, self.most_tokens - max(map(len, self.verdicts))
        while True:
            found = _Encoded(question, self._inputs(message, side))
            if found.length <= room:
                return found
            if side <= LEAST_SIDE or not message.pictures:
                return None
            side = max(LEAST_SIDE, side // 2)

    def _inputs(self, message: Message, side: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(
            self.processor.apply_chat_template(
                talk(message, side, self.prompt.mode),
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
        return found

    @torch.no_grad()
    def _scores(self, batch: Sequence[_Encoded]) -> Tensor:
        """Log-probabilities of the verdicts, from one padded batch of whole sequences, four a question."""
        rows = [(each.inputs, verdict) for each in batch for verdict in self.verdicts]
        lengths = [inputs["input_ids"].shape[1] + len(verdict) for inputs, verdict in rows]
        width, longest = max(lengths), max(map(len, self.verdicts))
        given = self._collated(rows, width)
        # Where rows end together, only their ends need logits.
        kept = longest + 1 if self.padding == "left" else width
        options = {} if self.padding == "right" else {"logits_to_keep": kept}
        logits = self.model(**{name: each.to(self.model.device) for name, each in given.items()}, **options).logits
        found = []
        for row, ((_, verdict), length) in enumerate(zip(rows, lengths, strict=True)):
            end = logits.shape[1] if self.padding == "left" else length
            before = logits[row, end - len(verdict) - 1 : end - 1].float().log_softmax(-1)
            found.append(before.gather(1, torch.tensor(verdict, device=before.device)[:, None]).sum())
        return torch.stack(found).view(len(batch), len(self.verdicts)).cpu()

    def _collated(self, rows: Sequence[tuple[dict[str, Tensor], list[int]]], width: int) -> dict[str, Tensor]:
        """One batch of rows with their verdicts: what runs along tokens is padded, pictures follow each other."""
        parts: dict[str, list[Tensor]] = {}
        for inputs, verdict in rows:
            length = inputs["input_ids"].shape[1]
            for name, tensor in inputs.items():
                if tensor.shape[:2] == (1, length):
                    own = {"input_ids": torch.tensor(verdict), "attention_mask": torch.ones(len(verdict))}
                    added = own.get(name, torch.zeros(len(verdict))).to(tensor)[None]
                    fill = width - length - len(verdict)
                    sides = (fill, 0) if self.padding == "left" else (0, fill)
                    whole = torch.cat([tensor, added], 1)
                    tensor = torch.nn.functional.pad(whole, sides, value=self.pad if name == "input_ids" else 0)
                parts.setdefault(name, []).append(tensor)
        return {name: torch.cat(each) for name, each in parts.items()}
