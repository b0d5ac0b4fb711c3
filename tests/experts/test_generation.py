"""Each row of a batch generates as its expert does alone: what ends it, what fills it up, and how it is sampled."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from transformers import GenerationConfig
from tuned_models import IDS, tuned

from tersor import zoo
from tersor.experts.compress import compress_expert
from tersor.experts.generation import ExpertGenerationConfig
from tersor.experts.host import ExpertHost

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")
ROWS = ["math", "code", None, "math"]
LENGTH = {"max_new_tokens": 12}
MASK, ONE = {"attention_mask": torch.ones_like(IDS)}, {"attention_mask": torch.ones_like(IDS[:1])}


def token_after(model: Any, row: int, number: int) -> int:
    """What a greedy answer to a row has at a place, so that it can be made the end of it."""
    found = model.generate(input_ids=IDS[row : row + 1], max_new_tokens=12, do_sample=False, pad_token_id=0)
    return int(found[0, 24 + number])


@pytest.fixture(scope="module")
def experts(base: Any) -> dict[str | None, Any]:
    """Models whose own settings end answers at other tokens, and fill them up with others."""
    found = {None: copy.deepcopy(base), "math": tuned(base, 1, size=0.3), "code": tuned(base, 2, size=0.3)}
    for name, row, pad in (("math", 0, 5), ("code", 1, 6), (None, 2, 7)):
        end = token_after(found[name], row, 3)
        found[name].generation_config = GenerationConfig(eos_token_id=[end, 198], pad_token_id=pad)
    return found


@pytest.fixture
def served(experts: dict[str | None, Any]) -> tuple[ExpertHost, dict[str | None, Any]]:
    host = ExpertHost(copy.deepcopy(experts[None]))
    for name in ("math", "code"):
        host.load_expert(name, compress_expert(experts[None], experts[name]))
    merged = {None: experts[None], **{name: host.merge(name) for name in ("math", "code")}}
    for name in ("math", "code"):
        merged[name].generation_config = experts[name].generation_config
    return host, merged


def alone(merged: dict[str | None, Any], rows: list[str | None], width: int, **kwargs: Any) -> list[list[int]]:
    found = []
    for row, name in enumerate(rows):
        answer = merged[name].generate(input_ids=IDS[row : row + 1], **ONE, **kwargs)[0].tolist()
        found.append(answer + [merged[name].generation_config.pad_token_id] * (width - len(answer)))
    return found


def test_each_row_ends_at_its_own_tokens_and_has_its_own_padding(served: Any) -> None:
    host, merged = served
    found = host.generate(input_ids=IDS, expert_names=ROWS, **LENGTH, **MASK)
    assert found.tolist() == alone(merged, ROWS, found.shape[1], **LENGTH)
    assert len({int(token) for token in found[:, -1]} & {5, 6, 7}) >= 2, "answers must end, or nothing was shown"
    single = host.generate(input_ids=IDS[:1], expert_names="math", **LENGTH)
    assert single.tolist() == alone(merged, ["math"], single.shape[1], **LENGTH)


def test_a_batch_that_ended_everywhere_stops(served: Any) -> None:
    host, merged = served
    rows = ["math", "code", None]
    found = host.generate(input_ids=IDS[:3], expert_names=rows, max_new_tokens=100)
    lengths = [len(merged[n].generate(IDS[r : r + 1], max_new_tokens=100)[0]) for r, n in enumerate(rows)]
    assert found.shape[1] == max(lengths) < 124


def test_what_a_call_says_comes_first(served: Any) -> None:
    host, merged = served
    ends = {"eos_token_id": 198, "pad_token_id": 9}
    for given in (ends, {"generation_config": GenerationConfig(**ends)}):
        found = host.generate(input_ids=IDS, expert_names=ROWS, **LENGTH, **MASK, **given)
        assert found.shape[1] == 36
        for row, name in enumerate(ROWS):
            wanted = merged[name].generate(IDS[row : row + 1], **ONE, **ends, **LENGTH)
            assert found[row].tolist() == wanted[0].tolist()


def test_beams_and_several_answers_end_by_row_too(served: Any) -> None:
    host, merged = served
    kwargs = {**LENGTH, "num_beams": 2, "num_return_sequences": 2}
    found = host.generate(input_ids=IDS, expert_names=ROWS, **kwargs, **MASK)
    assert len(found) == 8
    for row, name in enumerate(ROWS):
        wanted = merged[name].generate(input_ids=IDS[row : row + 1], **kwargs)
        for ours, theirs in zip(found[2 * row : 2 * row + 2].tolist(), wanted.tolist(), strict=True):
            pad = merged[name].generation_config.pad_token_id
            assert ours == theirs + [pad] * (len(ours) - len(theirs))


def test_experts_that_differ_in_more_than_their_ends_are_asked_group_by_group(served: Any, tmp_path: Path) -> None:
    host, merged = served
    strict = copy.deepcopy(merged["code"])
    settings = {"repetition_penalty": 5.0, "eos_token_id": 198, "pad_token_id": 6}
    strict.generation_config = GenerationConfig(**settings)
    host.load_expert("strict", compress_expert(merged[None], strict))
    rows = ["math", "strict", None, "strict"]
    found = host.generate(input_ids=IDS, expert_names=rows, max_new_tokens=7, **MASK)
    for row, name in ((1, "strict"), (3, "strict")):
        wanted = strict.generate(input_ids=IDS[row : row + 1], max_new_tokens=7)[0].tolist()
        assert found[row].tolist() == wanted + [6] * (found.shape[1] - len(wanted)), name
    for row, name in ((0, "math"), (2, None)):
        assert found[row].tolist() == alone(merged, [None] * row + [name], found.shape[1], max_new_tokens=7)[row]
    with pytest.raises(NotImplementedError, match=r"differ in .*one by one"):
        host.generate(input_ids=IDS, expert_names=rows, return_dict_in_generate=True, **MASK)


def test_settings_of_the_base_do_not_leak_into_experts(base: Any) -> None:
    loud = copy.deepcopy(base)
    expert = tuned(loud, 1)
    loud.generation_config = GenerationConfig(repetition_penalty=9.0, eos_token_id=3, pad_token_id=0, max_new_tokens=4)
    expert.generation_config = GenerationConfig(pad_token_id=0)
    host = ExpertHost(loud)
    host.load_expert("math", compress_expert(loud, expert))
    model = host.merge("math")
    model.generation_config = GenerationConfig(pad_token_id=0)
    assert host.generate(IDS, expert_names="math", max_new_tokens=9, **MASK).tolist() == (
        model.generate(IDS, max_new_tokens=9, **MASK).tolist()
    )
    config = ExpertGenerationConfig.of({}, None, {})
    config.update(**loud.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    assert config.repetition_penalty is None


def test_settings_travel_in_files_and_a_file_that_was_edited_counts(experts: Any, tmp_path: Path) -> None:
    for name in (None, "math"):
        experts[name].save_pretrained(tmp_path / str(name))
    delta = compress_expert(tmp_path / "None", tmp_path / "math")
    (tmp_path / "math" / "generation_config.json").unlink()
    implied = compress_expert(tmp_path / "None", tmp_path / "math")
    assert implied.manifest.generation_config.get("eos_token_id") is None
    delta.save_pretrained(tmp_path / "delta")
    compress_expert(experts[None], experts["math"]).save_pretrained(tmp_path / "memory")
    host = ExpertHost(copy.deepcopy(experts[None]))
    for folder in ("delta", "memory"):
        host.load_expert(folder, tmp_path / folder)
        assert host.settings(folder)["eos_token_id"] == experts["math"].generation_config.eos_token_id
    (tmp_path / "delta" / "generation_config.json").write_text(json.dumps({"eos_token_id": 11}))
    assert host.settings("delta") == {"eos_token_id": 11}
    (tmp_path / "delta" / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match="not valid JSON"):
        host.generate(IDS, expert_names="delta")


def test_conversations_are_put_into_each_experts_own_template(tmp_path: Path) -> None:
    base = build("llama")
    base = type(base)(type(base.config)(**{**base.config.to_dict(), "vocab_size": 300})).eval()
    tokenizer = zoo.load("tiny-lm")[1]
    said = "{{ messages[0].content }}"
    for name, template in {"base": None, "math": f"M: {said}", "code": f"{said} as code"}.items():
        (base if name == "base" else tuned(base, 1)).save_pretrained(tmp_path / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    host = ExpertHost(type(base).from_pretrained(tmp_path / "base").eval())
    for name in ("math", "code"):
        compress_expert(tmp_path / "base", tmp_path / name).save_pretrained(tmp_path / f"{name}-delta")
        host.load_expert(name, tmp_path / f"{name}-delta")
    turns = [[{"role": "user", "content": "two"}], [{"role": "user", "content": "sort it"}]]
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = host.generate(messages=turns, expert_names=["math", "code"], **kwargs)
    for row, (name, text) in enumerate((("math", "M: two"), ("code", "sort it as code"))):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        wanted = host.generate(ids, expert_names=name, **kwargs)[0, -4:]
        assert found[row, -4:].tolist() == wanted.tolist()
        assert host.tokenizer(name).decode(found[row, :-4]).endswith(text)
    with pytest.raises(ValueError, match="no chat template"):
        host.generate(messages=turns, expert_names=None)
    with pytest.raises(ValueError, match="not both"):
        host.generate(IDS, messages=turns, expert_names="math")
    with pytest.raises(ValueError, match="3 expert names for 2 conversations"):
        host.generate(messages=turns, expert_names=["math"] * 3)
    with pytest.raises(ValueError, match="brings no tokenizer"):
        ExpertHost(base).tokenizer(None)
