"""How each expert generates: its own settings, tokens that end an answer, and chat template, row by row in a batch.

Rows whose settings agree except for the tokens that end an answer are generated together. Others are generated one
group after the other, because a library call has one temperature and one length.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from tersor._errors import TersorError, UnsupportedError

#: Fields that may differ among rows of one call.
OF_A_ROW = ("eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "_from_model_config")
#: Arguments that are about a whole batch, so that it cannot be cut into groups.
OF_A_BATCH = ("streamer", "past_key_values", "logits_processor", "stopping_criteria")
FILE = "generation_config.json"


def own_settings(model: Any, config: Any, folder: Path | None) -> dict[str, Any]:
    """Settings that a checkpoint brings: of the model in memory, of its file, or as its configuration implies them."""
    found = getattr(model, "generation_config", None)
    if found is None and folder is not None and (folder / FILE).is_file():
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
    values: dict[str, Any] = json.loads((found or GenerationConfig.from_model_config(config)).to_json_string())
    return {name: value for name, value in values.items() if name != "transformers_version"}


class ExpertGenerationConfig(GenerationConfig):  # type: ignore[misc]
    """Settings of an expert, which the base's do not fill up."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As the library's, but for the call in which it fills up what is not set with the model's own settings."""
        if defaults_only and allow_custom_entries:
            return {}
        unused: dict[str, Any] = super().update(
            defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **kwargs
        )
        return unused

    @classmethod
    def of(cls, own: dict[str, Any], given: GenerationConfig | None, kwargs: dict[str, Any]) -> ExpertGenerationConfig:
        """What a call asks for, then what the expert's own settings say."""
        values = {} if given is None else {n: v for n, v in given.to_dict().items() if v is not None}
        return cls(**{**own, **values, **kwargs})


def generate_rows(model: Any, own: Sequence[dict[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``model.generate`` with the settings of each row.

    Args:
        model: The base, as its host has wrapped it.
        own: Settings of each row's expert, or of all rows where there is one.
        args: Of ``model.generate``.
        kwargs: The same, and "within": a function that gives a block in which given rows are answered.

    Returns:
        What ``model.generate`` does; answers of groups of other lengths are filled up with each row's own padding.

    Raises:
        UnsupportedError: If rows differ in settings, and the call cannot be cut into groups.
    """
    kwargs = kwargs | dict(zip(inspect.signature(model.generate).parameters, args, strict=False))
    within = kwargs.pop("within")
    given = kwargs.pop("generation_config", None)
    fields = vars(GenerationConfig())
    settings = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
    configs = [ExpertGenerationConfig.of(each, given, settings) for each in own]
    groups: dict[str, list[int]] = {}
    for row, config in enumerate(configs):
        groups.setdefault(_key(config), []).append(row)
    if len(groups) == 1:
        with within(None):
            return _generate(model, configs, kwargs)
    _check_cut(configs, kwargs)
    answers = {}
    for rows in groups.values():
        with within(rows):
            part = {name: _rows(name, value, rows, len(configs)) for name, value in kwargs.items()}
            answers[tuple(rows)] = _generate(model, [configs[row] for row in rows], part)
    return _together(answers, configs)


def _key(config: GenerationConfig) -> str:
    """Rows of one key can be generated in one call."""
    values = {name: value for name, value in config.to_dict().items() if name not in OF_A_ROW}
    # These count or forbid the tokens that end an answer, of which the library then knows one set for all rows.
    if config.min_length or config.min_new_tokens or (config.num_beams or 1) > 1:
        values["eos_token_id"] = config.eos_token_id
    return json.dumps(values, sort_keys=True, default=repr)


def _check_cut(configs: list[ExpertGenerationConfig], kwargs: dict[str, Any]) -> None:
    one = configs[0].to_dict()
    other = next(each.to_dict() for each in configs if _key(each) != _key(configs[0]))
    name = next(n for n in sorted({*one, *other}) if n not in OF_A_ROW[1:] and one.get(n) != other.get(n))
    whole = [n for n in OF_A_BATCH if kwargs.get(n) is not None]
    whole += ["return_dict_in_generate"] * any(each.return_dict_in_generate for each in configs)
    if whole:
        raise UnsupportedError(
            f"experts of this batch differ in {name} ({one.get(name)!r} and {other.get(name)!r}), and {whole[0]} is "
            f"for one call: give {name}= for all of them, or ask them one by one"
        )


def _rows(name: str, value: Any, rows: list[int], count: int) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if len(value) != count:
        raise UnsupportedError(
            f"experts of this batch differ in their settings, and {name} {list(value.shape)} cannot be shared out "
            f"among {count} rows: ask them one by one"
        )
    return value[torch.tensor(rows, device=value.device)]


def _generate(model: Any, configs: list[ExpertGenerationConfig], kwargs: dict[str, Any]) -> Any:
    config = copy.deepcopy(configs[0])
    ends, pads = [token_ids(each.eos_token_id) for each in configs], [_pad(each) for each in configs]
    if all(each == ends[0] for each in ends) and all(each == pads[0] for each in pads):
        return model.generate(generation_config=config, **kwargs)
    config.eos_token_id = None
    config.pad_token_id = next((pad for pad in pads if pad is not None), 0)
    criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ()), EndOfRow(ends)])
    answer = model.generate(generation_config=config, stopping_criteria=criteria, **kwargs)
    sequences = answer if isinstance(answer, Tensor) else answer.sequences
    prompt = kwargs.get("input_ids", kwargs.get("inputs"))
    start = 1 if model.config.is_encoder_decoder else 0 if prompt is None else prompt.shape[1]
    for place, row in enumerate(sequences):
        owner = place * len(configs) // len(sequences)
        end = torch.isin(row[start:], torch.tensor(ends[owner], device=row.device)).nonzero()
        if len(end) and pads[owner] is not None:
            row[start + int(end[0]) + 1 :] = pads[owner]
    return answer


def _together(answers: dict[tuple[int, ...], Tensor], configs: list[ExpertGenerationConfig]) -> Tensor:
    width = max(answer.shape[1] for answer in answers.values())
    first = next(iter(answers.values()))
    each = len(first) // len(next(iter(answers)))  # sequences of a row
    found = first.new_zeros(each * len(configs), width)
    for rows, answer in answers.items():
        if len(answer) != each * len(rows):
            raise UnsupportedError(
                "experts of this batch differ in num_return_sequences: give num_return_sequences= for all of them"
            )
        for place, row in enumerate(rows):
            kept = found[row * each : (row + 1) * each]
            kept[:] = _pad(configs[row]) or 0
            kept[:, : answer.shape[1]] = answer[place * each : (place + 1) * each]
    return found


def token_ids(token: Any) -> list[int]:
    """The ids that a setting names: none, one, or several."""
    return [] if token is None else [int(token)] if isinstance(token, int) else [int(each) for each in token]


def _pad(config: GenerationConfig) -> int | None:
    ends = token_ids(config.eos_token_id)
    return config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else None


class EndOfRow(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at one of its own tokens; rows of a larger batch are repeated in place, as beams are."""

    def __init__(self, ends: Sequence[Sequence[int]]) -> None:
        self.ends = [list(each) for each in ends]
        #: What the library looks for, to fill up rows that have ended.
        self.eos_token_id = torch.tensor(sorted({token for each in ends for token in each}))

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Whether each row ``[rows]`` has just ended."""
        last = input_ids[:, -1].tolist()
        owners = [place * len(self.ends) // len(last) for place in range(len(last))]
        done = [token in self.ends[owner] for token, owner in zip(last, owners, strict=True)]
        return torch.tensor(done, device=input_ids.device)


def chat_inputs(conversations: Sequence[Any], tokenizers: Sequence[Any]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[rows, tokens]``: each conversation in its expert's own chat template.

    Args:
        conversations: Lists of ``{"role": ..., "content": ...}``.
        tokenizers: One a row.

    Raises:
        TersorError: If a tokenizer has no chat template.
    """
    rows = []
    for turns, tokenizer in zip(conversations, tokenizers, strict=True):
        if not getattr(tokenizer, "chat_template", None):
            raise TersorError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: give input_ids instead of messages"
            )
        rows.append(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    longest = max(map(len, rows))
    # On the left, where generation reads on from; what stands there is masked.
    ids = [[row[0]] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
