"""What decodes and judges the zoo's image models, and models that have none."""

from __future__ import annotations

import pytest
import torch

from tersor import zoo
from tersor.grids.judge import ClipClassifier
from tersor.grids.pretrained import judge_of, load_image_tokenizer, load_judge


def test_the_tokenizer_is_the_model_s_own() -> None:
    for name in ("tiny-raster", "tiny-nar", "tiny-nar-video"):
        tokenizer = load_image_tokenizer(name)
        assert tokenizer.codebook_size == zoo.load_model(name).config.vocab_size
        again = zoo.load_image_tokenizer(name)
        ids = torch.arange(4).view(1, 2, 2)
        assert torch.equal(tokenizer.decode(ids), again.decode(ids))


def test_a_model_without_tokens_of_its_own_is_judged_by_the_one_that_has_them() -> None:
    assert judge_of("tiny-nar") == judge_of("tiny-nar-text") == judge_of("tiny-raster") == "tiny-raster"
    assert judge_of("tiny-nar-video") == "tiny-nar-video"
    ids = torch.randint(128, (2, 14, 14), generator=torch.Generator().manual_seed(0))
    images = [load_image_tokenizer(name).decode(ids) for name in ("tiny-nar", "tiny-raster")]
    assert torch.equal(*images)


def test_clips_have_a_judge_of_clips() -> None:
    judge, reference = load_judge("tiny-nar-video")
    assert isinstance(judge, ClipClassifier)
    assert not isinstance(load_judge("tiny-raster")[0], ClipClassifier)
    assert reference.joint.n > 1


def test_a_model_without_images_says_so() -> None:
    with pytest.raises(ValueError, match=r"tiny-lm makes no images; use zoo\.load\('tiny-lm'\)"):
        load_image_tokenizer("tiny-lm")
    with pytest.raises(ValueError, match="holds no classifier"):
        load_judge("tiny-lm")
