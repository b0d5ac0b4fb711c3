"""The toolkit's own image models draw for the arena."""

from __future__ import annotations

import pytest

from tersor._errors import TersorError
from tersor.opening.generators.images import CaptionImages, ClassImages
from tersor.opening.generators.specs import generator_of
from tersor.opening.records import Instance, Step


@pytest.mark.parametrize("text", ["images:tiny-raster", "images:tiny-raster:4", "images:tiny-nar-text"])
def test_a_prompt_becomes_a_picture_by_its_seed(text: str) -> None:
    words = "a thick seven" if "text" in text else "Draw the digit 7."
    instance = Instance("0101001", "1", "1", "1", "", "", (Step(words),), (Step("x"),))
    generator = generator_of(text)
    seeds = (1, 2) if text == "images:tiny-raster" else (1, 2, 1)  # token by token is slow
    pictures = [generator.generate(instance, n_steps=1, seed=seed).steps[0][1] for seed in seeds]
    assert len(seeds) == 2 or pictures[0].tobytes() == pictures[2].tobytes()
    assert pictures[0].mode == "RGB"
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert len(pictures[0].getcolors(10_000)) > 5
    assert generator.family == "integrated"


def test_prompts_that_a_model_cannot_read_are_refused() -> None:
    with pytest.raises(TersorError, match="does not know"):
        CaptionImages().draw("a photo of a cat", seed=0)
    for prompt in ("no digit", "3 or 4"):
        with pytest.raises(TersorError, match="draws one digit"):
            ClassImages().draw(prompt, seed=0)
