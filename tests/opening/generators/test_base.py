"""Generation goes on where it stopped, and counts an answer when it is whole."""

from __future__ import annotations

import pytest

from tersor._errors import TersorError
from tersor.opening.data import read_data
from tersor.opening.generators.base import generate_all
from tersor.opening.outputs import ANSWERS, Answer, model_folder
from tersor.opening.scenes import draw


class Counting:
    """Answers with one step, and counts; may break."""

    name, family = "counting", "scripted"

    def __init__(self, breaks_at: int | None = None) -> None:
        self.calls, self.breaks_at = [], breaks_at

    def generate(self, instance, *, n_steps, seed):
        if len(self.calls) == self.breaks_at:
            raise OSError("gone")
        self.calls.append((instance.uid, n_steps, seed))
        return Answer((("a step", draw({})),))


@pytest.fixture
def filled(store, mini_root):
    store.add_instances(read_data(mini_root).instances[:10], mini_root)
    return store


def test_it_goes_on_after_a_break(filled) -> None:
    with pytest.raises(OSError, match="gone"):
        generate_all(filled, Counting(breaks_at=4))
    rest = Counting()
    made = generate_all(filled, rest)
    assert (made.made, made.kept, len(rest.calls)) == (6, 4, 6)
    assert len(filled.outputs("counting")) == 10
    assert generate_all(filled, Counting(breaks_at=0)).kept == 10
    assert generate_all(filled, Counting(), overwrite=True).made == 10


def test_answers_of_other_settings_are_not_mixed(filled) -> None:
    with pytest.raises(OSError, match="gone"):
        generate_all(filled, Counting(breaks_at=4), seed=1)
    for settings in ({"seed": 2}, {"seed": 1, "steps": "free"}):
        with pytest.raises(TersorError, match=r"answered with steps and seed \['gold', 1\]"):
            generate_all(filled, Counting(), **settings)
    assert generate_all(filled, Counting(), seed=2, overwrite=True).made == 10


def test_an_answer_whose_picture_is_broken_is_made_again(filled) -> None:
    generate_all(filled, Counting())
    folder = model_folder(filled.folder / ANSWERS, "counting")
    sorted(folder.glob("*.jpg"))[2].write_bytes(b"half")
    again = Counting()
    assert generate_all(filled, again).made == 1


def test_an_answer_that_was_written_but_not_recorded_is_recorded(filled) -> None:
    generate_all(filled, Counting())
    filled.write("DELETE FROM output WHERE uid = ?", [(filled.instances()[0].uid,)])
    assert generate_all(filled, Counting(breaks_at=0)).made == 0
    assert len(filled.outputs("counting")) == 10


def test_the_number_of_steps_is_told_or_left_free_and_each_instance_has_a_seed(filled) -> None:
    told, free = Counting(), Counting()
    generate_all(filled, told)
    generate_all(filled, free, steps="free", overwrite=True)
    gold = {each.uid: len(each.gold) for each in filled.instances()}
    assert [count for _, count, _ in told.calls] == [gold[uid] for uid, _, _ in told.calls]
    assert {count for _, count, _ in free.calls} == {None}
    assert len({seed for _, _, seed in told.calls}) == 10
    assert [seed for *_, seed in told.calls] == [seed for *_, seed in free.calls]
