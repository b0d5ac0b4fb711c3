"""A judge on the disk: found by name or folder, asked with its own words, and refused where something is wrong."""

from __future__ import annotations

import json

import pytest

from tersor import zoo
from tersor._errors import TersorError
from tersor.opening.judging.adapter import CONFIG, FACTS, Facts, adapter_folder, load_adapter, read_facts, write_facts
from tersor.opening.prompts import JudgePrompt


def test_an_adapter_is_found_in_a_folder_below_it_and_in_the_zoo(tmp_path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / CONFIG).write_text("{}")
    assert adapter_folder(str(tmp_path / "run")) == tmp_path / "run" / "adapter"
    assert adapter_folder(str(tmp_path / "run" / "adapter")) == tmp_path / "run" / "adapter"
    assert adapter_folder(str(tmp_path)) is None and adapter_folder("tiny-vlm") is None
    assert adapter_folder("tiny-judge") == zoo.path("tiny-judge") / "adapter"


def test_words_and_temperature_are_kept(tmp_path) -> None:
    facts = Facts(prompt=JudgePrompt(system="Judge.", question="Which?", side=224), temperature=1.5)
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == facts
    assert read_facts(tmp_path / "elsewhere") == Facts(prompt=JudgePrompt())


@pytest.mark.parametrize(
    "said", ["{", "{}", '{"temperature": 1, "prompt": {"side": 5}}', '{"temperature": "x", "prompt": {}}']
)
def test_facts_that_say_nothing_are_refused(tmp_path, said) -> None:
    (tmp_path / FACTS).write_text(said)
    with pytest.raises(TersorError, match="says nothing of its judge"):
        read_facts(tmp_path)


def test_a_temperature_of_nothing_is_refused(tmp_path) -> None:
    (tmp_path / FACTS).write_text(json.dumps({"temperature": 0, "prompt": {}}))
    with pytest.raises(TersorError, match="must be a number above 0"):
        read_facts(tmp_path)


def test_an_adapter_without_its_model_is_refused(tmp_path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(TersorError, match="no such folder"):
        load_adapter(tmp_path, "cpu")
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(TersorError, match="cannot be loaded"):
        load_adapter(tmp_path, "cpu")
