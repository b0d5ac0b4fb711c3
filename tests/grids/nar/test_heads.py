"""NAR's model: visibility, mixing, positions, loss, and what they must not do."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nar_models import TEXT, condition, config, model, random_ids
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tersor._compat import checkpoint_activations
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar import heads as nar_module
from tersor.grids.nar.heads import NARForImageGeneration, mixing_plan, visibility

VARIANTS = {
    "image": ((3, 4), {}),
    "text": ((4, 3), TEXT),
    "none": ((2, 3), {"condition": "none"}),
    "video": ((2, 3, 2), {"position_type": "learned"}),
    "video rope": ((2, 2, 3), {}),
    "sincos": ((3, 2), {"position_type": "sincos"}),
    "grouped": ((3, 3), {"num_key_value_heads": 1}),
    "one head": ((3, 3), {"head_layers": (0,)}),
}


GRIDS = [*product(range(1, 6), repeat=2), *product(range(1, 4), repeat=3)]


@pytest.fixture(params=VARIANTS)
def variant(request) -> NARForImageGeneration:
    grid, changes = VARIANTS[request.param]
    return model(grid, **changes)


def cells_of(sizes) -> list[tuple[int, ...]]:
    return list(product(*map(range, sizes)))


@torch.no_grad()
def logits_of(of, ids) -> torch.Tensor:
    return of(ids, **condition(of)).logits


@pytest.mark.parametrize("sizes", GRIDS)
def test_visibility_is_the_definition(sizes) -> None:
    cells, prefix = cells_of(sizes), 3
    seen = visibility(sizes, prefix)
    for i, j in product(range(prefix + len(cells)), repeat=2):
        near = i >= prefix and (j < prefix or sum(cells[j - prefix]) <= sum(cells[i - prefix]))
        assert bool(seen[i, j]) == (near or j <= i < prefix)


@pytest.mark.parametrize("sizes", GRIDS)
def test_the_plan_is_the_mean_of_the_heads_that_see_a_cell(sizes) -> None:
    plan, cells = mixing_plan(sizes), cells_of(sizes)
    for index, cell in enumerate(cells):
        axes = [axis for axis in range(len(sizes)) if cell[axis] > 0]
        for head, axis in enumerate(reversed(range(len(sizes)))):
            source, weight = int(plan.sources[head, index]), float(plan.weights[head, index])
            if index == 0:
                assert (source, weight) == (0, pytest.approx(1 / len(sizes))), "all heads, at the prefix's last token"
            elif axis in axes:
                neighbour = tuple(each - (a == axis) for a, each in enumerate(cell))
                assert cells[source - 1] == neighbour
                assert weight == pytest.approx(1 / len(axes))
            else:
                assert (source, weight) == (0, 0.0)


def test_mixing_of_constant_heads_in_every_region() -> None:
    for sizes, values in (((3, 4), (2.0, 5.0)), ((2, 3, 2), (2.0, 5.0, 11.0))):
        of = model(sizes)
        of.head_logits = lambda head, normed, values=values: torch.full((*normed.shape[:2], 20), values[head])
        mixed = logits_of(of, random_ids(of)).view(2, *sizes, 20)[0, ..., 0]
        for cell in cells_of(sizes):
            seen = [value for value, place in zip(values, reversed(cell), strict=True) if place > 0] or values
            assert float(mixed[cell]) == pytest.approx(sum(seen) / len(seen))


@pytest.mark.parametrize(("sizes", "axes"), [((3, 4), (1,)), ((3, 4), (0, 1)), ((2, 3, 4), (2,))])
def test_flipped_axes_are_the_same_model_of_a_mirrored_grid(sizes, axes) -> None:
    of, mirrored = model(sizes), model(sizes, flipped_axes=axes)
    ids, over = random_ids(of).view(2, *sizes), [1 + axis for axis in axes]
    given = condition(of)
    with torch.no_grad():
        plain = of(ids.flip(over), labels=ids.flip(over), **given)
        found = mirrored(ids, labels=ids, **given)
    torch.testing.assert_close(found.logits.view(2, *sizes, -1), plain.logits.view(2, *sizes, -1).flip(over))
    torch.testing.assert_close(found.loss, plain.loss)
    drawn = [each.generate(**given, generator=torch.Generator().manual_seed(0)) for each in (of, mirrored)]
    assert torch.equal(drawn[1], drawn[0].flip(over)) and not torch.equal(*drawn)


@pytest.mark.parametrize(("mixing", "head"), [("right", 0), ("below", 1), ("later", 2)])
def test_one_sided_mixing_takes_one_head_where_it_sees_the_cell(mixing, head) -> None:
    sizes = (2, 3, 2)
    plan, mean, cells = mixing_plan(sizes, mixing), mixing_plan(sizes), cells_of(sizes)
    for index, cell in enumerate(cells):
        expected = mean.weights[:, index]
        if tuple(reversed(cell))[head] > 0:
            expected = torch.eye(3)[head]
        torch.testing.assert_close(plan.weights[:, index], expected)


def test_nothing_leaks_and_the_front_before_matters(variant) -> None:
    ids, sizes = random_ids(variant), variant.config.grid_size
    before, cells = logits_of(variant, ids), cells_of(sizes)
    for target in range(len(cells)):
        distance = sum(cells[target])
        later = ids.flatten(1).clone()
        for other, cell in enumerate(cells):
            if sum(cell) >= distance:
                later[:, other] = (later[:, other] + 7) % 20
        torch.testing.assert_close(logits_of(variant, later)[:, target], before[:, target], atol=1e-5, rtol=0)
        for other, cell in enumerate(cells):
            if sum(cell) == distance - 1:
                changed = ids.flatten(1).clone()
                changed[:, other] = (changed[:, other] + 7) % 20
                assert (logits_of(variant, changed)[:, target] - before[:, target]).abs().max() > 1e-4


def test_a_front_sees_itself() -> None:
    of = model((3, 4))
    states = []
    of.model.register_forward_hook(lambda module, args, output: states.append(output))
    ids = random_ids(of)
    logits_of(of, ids)
    ids[:, 0, 2] = (ids[:, 0, 2] + 7) % 20
    logits_of(of, ids)
    for first, second in zip(*states, strict=True):
        moved = (first - second)[:, 1:].abs().amax(-1).view(2, 3, 4)
        assert (moved[:, 1, 1] > 1e-4).all() and (moved[:, 2, 0] > 1e-4).all(), "the same front"
        assert (moved[:, 0, :2] == 0).all() and (moved[:, 1, 0] == 0).all(), "earlier fronts"


def test_a_single_row_is_a_raster_model_from_its_second_cell_on() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_classes": 5}
    raster = LlamaGen(LlamaGenConfig(**shape, grid_size=(1, 6), initializer_range=0.3)).eval()
    of = NARForImageGeneration.from_raster(raster)
    torch.nn.init.normal_(of.outputs[1].weight)
    ids, labels = torch.randint(0, 20, (2, 6)), torch.tensor([4, 1])
    with torch.no_grad():
        ours = of(ids, class_labels=labels).logits
        theirs = raster(input_ids=ids, class_labels=labels).logits[:, :-1]
    torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], atol=1e-5, rtol=0)
    assert (ours[:, 0] - theirs[:, 0]).abs().max() > 0.1, "the first cell averages all heads"


def test_transposing_the_grid_and_swapping_the_heads_transposes_the_law() -> None:
    # Without positions and further blocks nothing but the heads tells rows from columns.
    of, other = (model(grid, head_layers=(0, 0)) for grid in ((3, 4), (4, 3)))
    other.load_state_dict(of.state_dict())
    other.norms, other.outputs = other.norms[::-1], other.outputs[::-1]
    for each in (of, other):
        each.model.rotation = lambda sizes: (torch.ones(13, 1, 16), torch.zeros(13, 1, 16))
    ids = random_ids(of)
    straight = logits_of(of, ids).view(2, 3, 4, 20)
    torch.testing.assert_close(logits_of(other, ids.mT.contiguous()).view(2, 4, 3, 20), straight.transpose(1, 2))


def test_the_loss_is_the_cross_entropy_of_the_mixed_logits_and_of_each_head(variant, monkeypatch) -> None:
    ids = random_ids(variant)
    labels = ids.clone()
    labels[0, ..., -1] = -100
    given = condition(variant)
    with torch.no_grad():
        out = variant(ids, labels=labels, **given)
        expected = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(out.loss, expected)
        monkeypatch.setattr(nar_module, "_LOGITS_AT_ONCE", 2 * 20 * 3)
        torch.testing.assert_close(variant(ids, labels=labels, **given).loss, expected)
        states = []
        variant.model.register_forward_hook(lambda module, args, output: states.append(output))
        variant.config.aux_head_loss_weight = 0.5
        loss = variant(ids, labels=labels, **given).loss
        sizes, start = variant.config.grid_size, variant.config.condition_tokens
        for number, axis in enumerate(reversed(range(len(sizes)))):
            head = min(number, len(variant.outputs) - 1)
            state = states[0][head][:, start:].unflatten(1, sizes)
            if sizes[axis] > 1:
                before = state.narrow(axis + 1, 0, sizes[axis] - 1).flatten(1, -2)
                predicted = variant.outputs[head](variant.norms[head](before))
                wanted = labels.narrow(axis + 1, 1, sizes[axis] - 1)
                expected = expected + 0.5 * F.cross_entropy(predicted.flatten(0, 1), wanted.flatten())
    torch.testing.assert_close(loss, expected)


def test_gradient_checkpointing_and_chunks_give_the_same_gradients(monkeypatch) -> None:
    gradients = []
    for chunked in (False, True):
        of = model((3, 4), condition_dropout=0.0, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0).train()
        if chunked:
            checkpoint_activations(of)
            monkeypatch.setattr(nar_module, "_LOGITS_AT_ONCE", 2 * 20 * 5)
        ids = random_ids(of)
        of(ids, labels=ids, **condition(of)).loss.backward()
        gradients.append({name: each.grad for name, each in of.named_parameters()})
    for name, each in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], each, atol=1e-5, rtol=1e-4, msg=name)
    assert all(bool(each.any()) for each in gradients[0].values())


@pytest.mark.parametrize("text", [False, True])
def test_a_compiled_model_is_one_graph_with_the_same_loss(text) -> None:
    of = model((3, 4), **(TEXT if text else {}))
    ids = random_ids(of)
    expected = of(ids, labels=ids, **condition(of)).loss
    compiled = torch.compile(of, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, labels=ids, **condition(of)).loss, expected, atol=1e-5, rtol=0)


def test_training_drops_conditions_and_starts_from_a_uniform_law() -> None:
    torch.manual_seed(0)
    of = NARForImageGeneration(config(condition_dropout=0.5)).train()
    ids = random_ids(of, batch=32)
    out = of(ids, class_labels=torch.zeros(32, dtype=torch.long), labels=ids)
    assert out.logits is None and float(out.loss.detach()) == pytest.approx(math.log(20), rel=1e-5), (
        "outputs are zero at first"
    )
    for output in of.outputs:
        torch.nn.init.normal_(output.weight)
    of(ids, class_labels=torch.zeros(32, dtype=torch.long), labels=ids).loss.backward()
    used = of.model.cls_embedding.embedding_table.weight.grad.abs().sum(-1) > 0
    assert used.nonzero().flatten().tolist() == [0, 5], "class 0, and the null class"


def test_an_overfitted_model_decodes_its_images() -> None:
    torch.manual_seed(0)
    none = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0, "condition_dropout": 0.0}
    of = NARForImageGeneration(config((4, 5), num_classes=16, initializer_range=0.05, **none)).train()
    ids, labels = random_ids(of, batch=16), torch.arange(16)
    optimizer = torch.optim.AdamW(of.parameters(), lr=3e-3)
    for _ in range(400):
        loss = of(ids, class_labels=labels, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if float(loss.detach()) < 0.02:
            break
    of.eval()
    with torch.no_grad():
        assert float(of(ids, class_labels=labels, labels=ids).loss) < 0.05
    assert torch.equal(of.generate(labels, temperature=0, guidance_scale=1), ids)


def test_the_trainer_takes_it_as_it_is(tmp_path) -> None:
    of = model((2, 3))
    rows = [
        {"input_ids": ids.flatten(), "labels": ids.flatten(), "class_labels": torch.tensor(number % 5)}
        for number, ids in enumerate(random_ids(of, batch=8))
    ]
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "save_steps": 2}
    trainer = Trainer(of, TrainingArguments(str(tmp_path), **settings), train_dataset=rows, eval_dataset=rows)
    before = of.outputs[0].weight.detach().clone()
    assert math.isfinite(trainer.train().training_loss)
    assert not torch.equal(before, of.outputs[0].weight)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    saved = NARForImageGeneration.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert all(torch.equal(each, saved.state_dict()[name]) for name, each in of.state_dict().items())


def test_saved_models_come_back(variant, tmp_path) -> None:
    variant.save_pretrained(tmp_path)
    again = NARForImageGeneration.from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == variant.config.to_diff_dict()
    ids = random_ids(variant)
    assert torch.equal(logits_of(variant, ids), logits_of(again, ids))


def test_a_raster_model_is_a_start() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_classes": 5}
    raster = LlamaGen(LlamaGenConfig(**shape, grid_size=(3, 4)))
    of = NARForImageGeneration.from_raster(raster, token_dropout=0.2)
    ours, theirs = of.state_dict(), raster.state_dict()
    assert of.config.token_dropout == 0.2 and of.config.num_classes == 5
    assert torch.equal(ours["model.layers.2.attention.wo.weight"], theirs["layers.1.attention.wo.weight"])
    assert torch.equal(ours["outputs.1.weight"], theirs["output.weight"])
    assert (
        ours["outputs.1.weight"].data_ptr() != ours["outputs.0.weight"].data_ptr() != theirs["output.weight"].data_ptr()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.full((2, 12), 20)}, "from 0 to 19"),
        ({"input_ids": torch.full((2, 12), -100)}, "from 0 to 19"),
        ({"input_ids": torch.zeros(2, 11, dtype=torch.long)}, r"\[batch, 12\]"),
        ({"input_ids": torch.zeros(2, 4, 3, dtype=torch.long)}, r"\[batch, 12\]"),
        ({"input_ids": torch.zeros(2, 12)}, "whole numbers"),
        ({"labels": torch.full((2, 12), 20)}, "labels must be from 0 to 19"),
        ({"class_labels": torch.tensor([5, 0])}, "null class is for guidance"),
        ({"class_labels": torch.tensor([1])}, "1 conditions for 2 samples"),
        ({"class_labels": None}, "give class_labels"),
        ({"grid_size": (2, 2, 3)}, "must have 2 axes"),
    ],
)
def test_bad_inputs(given, message) -> None:
    of = model((3, 4))
    good = {"input_ids": random_ids(of), "class_labels": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=message):
        of(**{**good, **given})


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_so_many_samples_lose_their_condition_in_training(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = model((2, 2), condition_dropout=share).train(), []
    plain = made.model.condition

    def look(*args: Any, dropped: Tensor, **kwargs: Any) -> Any:
        seen.append(dropped)
        return plain(*args, dropped=dropped, **kwargs)

    monkeypatch.setattr(made.model, "condition", look)
    torch.manual_seed(0)
    count = 4000
    made(torch.zeros(count, 4, dtype=torch.long), class_labels=torch.zeros(count, dtype=torch.long))
    deviation = (share * (1 - share) / count) ** 0.5
    assert abs(float(seen[0].float().mean()) - share) < 4 * deviation
    made.eval()(torch.zeros(2, 4, dtype=torch.long), class_labels=torch.zeros(2, dtype=torch.long))
    assert seen[1] is None
