"""Classes and texts: what is taken, how it is fitted, and what is refused in one line."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from tersor._errors import TersorError
from tersor.grids.conditions import CaptionEmbedding, ClassEmbedding, as_classes, class_numbers, fit_text
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar import NARConfig, NARForImageGeneration
from tersor.grids.zipar import zipar_generate

SIZES = SimpleNamespace(hidden_size=32, num_classes=5, caption_size=6, condition_tokens=3)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_class_is_a_row_of_the_table_and_the_null_class_its_last() -> None:
    embedding = ClassEmbedding(SIZES)
    table = embedding.embedding_table.weight
    assert len(table) == 6
    for guided in (False, True):
        for dropped in (None, torch.tensor([False, True, False])):
            rows = [4, 1 if dropped is None else 5, 0] + [5, 5, 5] * guided
            found, valid = embedding.prefix(torch.tensor([4, 1, 0]), guided=guided, dropped=dropped)
            assert torch.equal(found, table[rows][:, None])
            assert valid.dtype == torch.bool and valid.shape == (len(rows), 1) and bool(valid.all())


def test_a_caption_goes_through_two_matrices_and_the_null_condition_in_its_place() -> None:
    embedding = CaptionEmbedding(SIZES)
    embedding.init_null()
    assert embedding.uncond_embedding.std().item() == pytest.approx(6**-0.5, rel=0.5)
    features, valid = random(2, 3, 6), torch.tensor([[False, True, True], [True, True, True]])
    null = embedding.uncond_embedding

    def projected(x: Tensor) -> Tensor:
        return F.gelu(x @ embedding.cap_proj.fc1.weight.T, approximate="tanh") @ embedding.cap_proj.fc2.weight.T

    for guided in (False, True):
        for dropped in (None, torch.tensor([False, True])):
            rows = [features[0], features[1] if dropped is None else null, *[null, null] * guided]
            found, seen = embedding.prefix(features, valid, guided=guided, dropped=dropped)
            torch.testing.assert_close(found, projected(torch.stack(rows)))
            assert torch.equal(seen, torch.cat([valid] * (1 + guided))), "the null is masked like the text beside it"


@pytest.mark.parametrize("given", [[3, 0], (3, 0), torch.tensor([3, 0]), torch.tensor([3, 0], dtype=torch.int32)])
def test_classes_come_in_any_sequence(given) -> None:
    found = as_classes(given, 5)
    assert found.tolist() == [3, 0] and found.dtype == torch.long


@pytest.mark.parametrize(
    "given",
    [[], torch.zeros(0, dtype=torch.long), [1.0], torch.tensor([1.0]), [True], 3, torch.tensor(3), [5], [-1], [[1]],
     "cat", ["cat"], [None]],
)  # fmt: skip
def test_what_is_no_class_is_refused(given) -> None:
    with pytest.raises(TersorError, match=r"class_labels=.* must be \[batch\]: whole numbers from 0 to 4"):
        as_classes(given, 5)


@pytest.mark.parametrize("labels", [[3, 1], torch.tensor([3, 1])])
def test_models_take_classes_as_a_list(labels) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "grid_size": (3, 3)}
    raster, fronts = LlamaGen(LlamaGenConfig(**sizes)).eval(), NARForImageGeneration(NARConfig(**sizes)).eval()
    expected = zipar_generate(raster, torch.tensor([3, 1]), do_sample=False)
    assert torch.equal(zipar_generate(raster, labels, do_sample=False), expected)
    assert raster.generate(labels, do_sample=False).shape == (2, 9)
    assert fronts.generate(labels).shape == (2, 3, 3)
    for wrong in ([], [1.5], [2000]):
        for call in (partial(zipar_generate, raster), raster.generate, fronts.generate):
            with pytest.raises(TersorError, match="class_labels="):
                call(wrong)


@pytest.mark.parametrize(
    ("names", "given", "wanted"),
    [
        (None, ["3", "0"], [3, 0]),
        (["cat", "dog", "3d", "x"], ["dog", "0", "3d"], [1, 0, 2]),
        (["2", "10", "cat", "x"], ["10", "cat"], [1, 2]),
        (["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], ["1"], [1]),
    ],
)
def test_classes_have_names_and_numbers(names, given, wanted) -> None:
    config = PreTrainedConfig(id2label=None if names is None else dict(enumerate(names)))
    config.num_classes = 4
    assert class_numbers(given, config) == wanted


@pytest.mark.parametrize(
    ("names", "given"), [(None, "cat"), (None, "4"), (["2", "10", "cat", "x"], "0"), (["cat", "dog", "x", "y"], "4")]
)
def test_no_number_means_two_classes(names, given) -> None:
    config = PreTrainedConfig(id2label=None if names is None else dict(enumerate(names)))
    config.num_classes = 4
    with pytest.raises(TersorError, match=f"'{given}' is no class of this model; it has (0 to 3|{(names or ' ')[0]},)"):
        class_numbers([given], config)


def test_texts_are_padded_on_the_left_or_cut_at_the_end() -> None:
    features = torch.arange(9.0)[None, :, None].expand(2, 9, 10)
    mask = torch.ones(2, 9)
    mask[1, :5] = 0
    with pytest.warns(UserWarning, match="9 tokens is cut to 7"):
        fitted, valid = fit_text(features, mask, 7, 10)
    assert fitted[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6] and valid[0].all()
    assert fitted[1, 3:, 0].tolist() == [5, 6, 7, 8] and valid[1].tolist() == [False] * 3 + [True] * 4
    fitted, valid = fit_text(features[:, :4], None, 7, 10)
    assert fitted.shape == (2, 7, 10) and valid[0].tolist() == [False] * 3 + [True] * 4


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(0, 7, 10), None, "at least one"),
        (torch.zeros(1, 7, 9), None, r"\[batch, tokens, 10\]"),
        ([[1.0]], None, "got list"),
        (torch.zeros(1, 7, 10), torch.ones(1, 6), "like text_features"),
        (torch.zeros(1, 7, 10), torch.tensor([[1, 1, 1, 0, 0, 0, 0]]), "padded on the right"),
        (torch.zeros(1, 7, 10), torch.tensor([[0, 1, 0, 1, 1, 1, 1]]), "holes"),
    ],
)
def test_other_texts_are_refused(features, mask, message) -> None:
    with pytest.raises(TersorError, match=message):
        fit_text(features, mask, 7, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("guided", [False, True])
def test_features_may_have_any_dtype(dtype, guided) -> None:
    """Numbers that every dtype has; the null condition keeps all of its digits beside them."""
    embedding = CaptionEmbedding(SIZES)
    embedding.init_null()
    features, dropped = (4 * random(2, 3, 6)).round(), torch.tensor([True, False])
    wanted, _ = embedding.prefix(features, None, guided=guided, dropped=dropped)
    found, valid = embedding.prefix(features.to(dtype), None, guided=guided, dropped=dropped)
    assert torch.equal(found, wanted) and found.dtype == torch.float32 and valid.all()
    torch.testing.assert_close(found[0], embedding.cap_proj(embedding.uncond_embedding))
