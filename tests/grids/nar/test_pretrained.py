"""What decodes the zoo's clips and reads its captions, and models that have neither."""

from __future__ import annotations

import json

import pytest
import torch

from tersor import zoo
from tersor.grids.nar.pretrained import load_text_encoder, load_video_tokenizer


def test_a_clip_has_as_many_frames_a_token_as_its_tokenizer_has_channels() -> None:
    tokenizer = load_video_tokenizer("tiny-nar-video")
    ids = torch.randint(tokenizer.codebook_size, (2, 4, 7, 7), generator=torch.Generator().manual_seed(0))
    clips = tokenizer.decode(ids)
    config = json.loads((zoo.path("tiny-nar-video") / "tokenizer" / "config.json").read_text(encoding="utf-8"))
    images = zoo.load_image_tokenizer("tiny-nar-video").decode(ids.flatten(0, 1))
    assert clips.shape[:3] == (2, 4 * config["channels"], 1)
    for sample in range(2):
        for frame in range(clips.shape[1]):
            token, channel = divmod(frame, config["channels"])
            assert torch.equal(clips[sample, frame, 0], images[4 * sample + token, channel])


def test_captions_become_rows_of_words() -> None:
    encode = load_text_encoder("tiny-nar-text")
    features, mask = encode(["a seven", "a thick seven"])
    config = zoo.load_model("tiny-nar-text").config
    assert features.shape[2] == config.caption_size and mask.shape == features.shape[:2]
    assert mask.sum(-1).tolist() == [2, 3]
    # Padding comes first, and the same word has the same features wherever it stands.
    assert torch.equal(features[0, -1], features[1, -1]) and torch.equal(features[0, -2], features[1, -3])
    assert not torch.equal(features[1, -1], features[1, -2])


def test_others_say_what_they_are_not() -> None:
    with pytest.raises(ValueError, match="makes no videos"):
        load_video_tokenizer("tiny-nar")
    with pytest.raises(ValueError, match="makes no videos"):
        load_video_tokenizer("tiny-lm")
    with pytest.raises(ValueError, match="reads no captions"):
        load_text_encoder("tiny-nar")
