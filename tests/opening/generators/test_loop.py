"""One function is a generator."""

from __future__ import annotations

import pytest

from tersor._errors import TersorError
from tersor.opening.data import read_data
from tersor.opening.generators.loop import StepLoop


@pytest.fixture
def instance(mini_root):
    return next(each for each in read_data(mini_root).instances if each.inputs[0].image is not None)


def count(given, made, seed):
    """A step that says what it was given."""
    return (f"{len(given)} {len(made)} {seed}", given[0][1]) if len(made) < 7 else None


def test_each_step_sees_the_input_and_the_steps_before(instance) -> None:
    steps = StepLoop(count, name="x").generate(instance, n_steps=3, seed=10).steps
    n = len(instance.inputs)
    assert [text for text, _ in steps] == [f"{n} 0 10", f"{n} 1 11", f"{n} 2 12"]
    assert steps[0][1].size == (96, 96)
    assert len(StepLoop(count, name="x").generate(instance, n_steps=None, seed=0).steps) == 7
    assert len(StepLoop(lambda *given: ("more", None), name="x").generate(instance, n_steps=None, seed=0).steps) == 10


def test_a_function_is_found_by_its_name(instance, tmp_path, monkeypatch) -> None:
    (tmp_path / "my_module.py").write_text("def make_step(given, made, seed):\n    return 'hello', None\n")
    monkeypatch.syspath_prepend(tmp_path)
    loop = StepLoop.from_text("my_module:make_step")
    assert loop.name == "make_step"
    assert loop.generate(instance, n_steps=1, seed=0).steps == (("hello", None),)


def test_what_is_no_step_is_refused(instance) -> None:
    with pytest.raises(TersorError, match="must return a text and a picture"):
        StepLoop(lambda *given: "text", name="x").generate(instance, n_steps=1, seed=0)
