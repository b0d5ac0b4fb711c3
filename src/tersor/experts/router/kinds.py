"""The four kinds of routers: a language model that names a letter, a classifier, a linear head on hidden states, rules.

The language model reads a lettered list of the experts and answers with one letter. Only the letters' logits count, so
one forward pass is an answer and nothing is parsed. Letters are shuffled in training and carry no meaning: another
expert is another line of the list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tersor import _atomic
from tersor._errors import TersorError
from tersor._weights import save_tensors
from tersor.experts.router.config import RouterConfig, Scorer
from tersor.zoo.inspection import check_config, check_finite, refused

HEAD_FILE, RULES_FILE = "router_head.safetensors", "router_rules.json"
#: Requests that are scored in one forward pass.
BATCH = 32
QUESTION = "Who answers this best?"


class _Saved:
    """A model and its tokenizer, which `load_backbone` reads."""

    model: Any
    tokenizer: Any

    def save(self, folder: Path) -> None:
        """Write model and tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class LLMScorer(_Saved):
    """A causal language model that is asked for a letter."""

    def __init__(self, model: Any, tokenizer: Any, experts: Mapping[str, str], max_tokens: int) -> None:
        """Raises `ValueError` if the tokenizer has no single tokens for as many letters as there are experts."""
        self.model, self.tokenizer = model.eval(), tokenizer
        self.experts, self.max_tokens = dict(experts), max_tokens
        self.letters = letter_tokens(tokenizer, len(experts))

    def prompt(self, text: str, order: Sequence[int]) -> list[int]:
        """Ids of the question about ``text``, with the experts listed in ``order``; a long text loses its start."""
        names = list(self.experts)
        lines = [f"{ascii_uppercase[i]}. {names[e]}: {self.experts[names[e]]}" for i, e in enumerate(order)]
        head = self._ids("\n".join([QUESTION, *lines, "Request: "]))
        body, tail = self._ids(text), self._ids("\nAnswer:")
        room = self.max_tokens - len(head) - len(tail)
        if room < 1:
            raise TersorError(
                f"the list of experts takes {len(head) + len(tail)} of max_tokens={self.max_tokens}; give more tokens "
                "or shorter descriptions"
            )
        return head + body[-room:] + tail

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """As `Scorer.probabilities`, in one forward pass for `BATCH` requests."""
        order = list(range(len(self.experts)))
        parts = []
        for start in range(0, len(texts), BATCH):
            logits = last_logits(self.model, [self.prompt(text, order) for text in texts[start : start + BATCH]])
            parts.append(logits[:, self.letters].float().softmax(-1).cpu())
        return torch.cat(parts)


def letter_tokens(tokenizer: Any, count: int) -> list[int]:
    """Tokens of the first ``count`` capitals as they follow "Answer:", each with a space before it if it has to be.

    Raises:
        ValueError: If that is not one token each.
    """
    for lead in (" ", ""):
        ids = [tokenizer.encode(lead + letter, add_special_tokens=False) for letter in ascii_uppercase[:count]]
        if len(ids) == count and all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == count:
            return [one[0] for one in ids]
    raise TersorError(
        f"the router's tokenizer has no single tokens for {count} different letters (26 at most); use kind 'encoder'"
    )


def last_logits(model: Any, prompts: Sequence[list[int]]) -> Tensor:
    """Logits ``[prompts, vocabulary]`` of what follows each prompt; padded on the right, behind a causal mask."""
    ids, mask = padded(prompts, model.device)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    ends = mask.sum(1) - 1
    logits: Tensor = model.get_output_embeddings()(hidden[torch.arange(len(ids), device=ids.device), ends])
    return logits


def padded(rows: Sequence[list[int]], device: torch.device, *, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids ``[rows, longest]``, padded on the right with ``fill``, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


class _Reader(_Saved):
    """Texts as ids, for kinds that read nothing else; of longer ones the end."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self.model, self.tokenizer, self.max_tokens = model.eval(), tokenizer, max_tokens
        tokenizer.truncation_side = "left"

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, with the start and end marks that the tokenizer sets."""
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        return padded(rows, self.model.device, fill=self.model.config.pad_token_id or 0)


class EncoderScorer(_Reader):
    """An `AutoModelForSequenceClassification` with a label for each expert."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        super().__init__(model, tokenizer, max_tokens)
        if model.config.pad_token_id is None:  # decoders classify at the last token that is no padding
            model.config.pad_token_id = tokenizer.pad_token_id

    def logits(self, texts: Sequence[str]) -> Tensor:
        """``[texts, experts]``."""
        ids, mask = self.read(texts)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """As `Scorer.probabilities`."""
        parts = [self.logits(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        return torch.cat(parts).float().softmax(-1).cpu()


class EmbeddingScorer(_Reader):
    """A linear head on the mean of a model's last hidden states; the model itself is not trained."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int, head: nn.Linear) -> None:
        super().__init__(model, tokenizer, max_tokens)
        self.head = head

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Float32 ``[texts, hidden]`` of length 1."""
        parts = []
        for start in range(0, len(texts), BATCH):
            ids, mask = self.read(texts[start : start + BATCH])
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            parts.append(nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """As `Scorer.probabilities`."""
        scores: Tensor = self.head(self.embed(texts))
        return scores.softmax(-1)

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and head."""
        super().save(folder)
        save_tensors(folder / HEAD_FILE, self.head.state_dict())


class RulesScorer:
    """Regular expressions by expert: each one that a request matches, whatever its case, is a vote."""

    def __init__(self, rules: Mapping[str, Sequence[str]], experts: Sequence[str]) -> None:
        """Raises `ValueError` if the rules are not for ``experts``, or one is no regular expression."""
        if set(rules) != set(experts):
            raise TersorError(f"rules are for {sorted(rules)}, the router's experts are {sorted(experts)}")
        self.rules = {name: list(rules[name]) for name in experts}
        self._compiled: list[list[re.Pattern[str]]] = []
        for name, patterns in self.rules.items():
            try:
                self._compiled.append([re.compile(pattern, re.IGNORECASE) for pattern in patterns])
            except (re.error, TypeError) as error:
                raise TersorError(f"a rule of expert {name!r} is no regular expression: {error}") from None

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Shares of the votes; the same for all experts where no rule matches, which a threshold can catch."""
        votes = torch.tensor(
            [[sum(bool(p.search(t)) for p in group) for group in self._compiled] for t in texts]
        ).float()
        total = votes.sum(1, keepdim=True)
        return torch.where(total > 0, votes / total.clamp_min(1), 1 / len(self.rules))

    def save(self, folder: Path) -> None:
        """Write the rules."""
        _atomic.write_text(folder / RULES_FILE, json.dumps(self.rules, indent=1) + "\n")


def load_scorer(config: RouterConfig, folder: Path) -> Scorer:
    """What `Scorer.save` wrote; raises `ValueError` where it is missing or does not fit the configuration."""
    if config.kind == "rules":
        return RulesScorer(read_rules(folder / RULES_FILE), list(config.experts))
    model, tokenizer = load_backbone(config.kind, folder, len(config.experts))
    if config.kind == "llm":
        return LLMScorer(model, tokenizer, config.experts, config.max_tokens)
    if config.kind == "encoder":
        return EncoderScorer(model, tokenizer, config.max_tokens)
    head = nn.Linear(model.config.hidden_size, len(config.experts))
    try:
        head.load_state_dict(load_file(folder / HEAD_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TersorError(f"{folder / HEAD_FILE} is no head for {len(config.experts)} experts: {error}") from None
    return EmbeddingScorer(model, tokenizer, config.max_tokens, head)


def load_backbone(kind: str, folder: Path, experts: int) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, as a router of ``kind`` needs them.

    Raises:
        ValueError: If the folder holds no checkpoint, or a classifier with another number of labels.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    check_config(folder)
    auto: Any = {"llm": AutoModelForCausalLM, "encoder": AutoModelForSequenceClassification, "embedding": AutoModel}
    further = {"num_labels": experts} if kind == "encoder" else {}
    # A head that is trained from here on may be missing; `refused` also tells of a classifier with other labels.
    with refused(f"{folder} as a router of kind {kind!r} for {experts} experts"):
        model = auto[kind].from_pretrained(folder, local_files_only=True, use_safetensors=True, **further)
    check_finite(dict(model.named_parameters()), str(folder))
    with refused(f"the tokenizer of {folder}"):
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read_rules(file: Path) -> dict[str, list[str]]:
    """Regular expressions by expert from a JSON file; raises `ValueError` for anything else."""
    try:
        rules = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TersorError(f"{file} holds no rules: {error}") from None
    if not isinstance(rules, dict) or not all(isinstance(each, list) for each in rules.values()):
        raise TersorError(f'{file} must be {{"expert": ["regular expression", ...], ...}}')
    return rules
