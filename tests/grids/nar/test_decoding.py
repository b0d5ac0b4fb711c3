"""NAR's decoding: it follows the training forward, in as many passes as there are fronts."""

from __future__ import annotations

import doctest
from itertools import product

import pytest
import torch
from nar_models import TEXT, condition, model

from tersor.grids.geometry import front_count, fronts
from tersor.grids.nar import heads as nar
from tersor.grids.schedule import NARSchedule

CASES = [
    ((3, 4), {}, False),
    ((5, 2), {}, False),
    ((1, 4), {}, False),
    ((4, 1), TEXT, True),
    ((3, 4), TEXT, False),
    ((3, 4), TEXT, True),
    ((2, 3), {"condition": "none"}, False),
    ((2, 3), {"head_layers": (0,)}, False),
    ((3, 3), {"num_key_value_heads": 1, "head_layers": (1, 2)}, False),
    ((3, 4), {"flipped_axes": (1,)}, False),
    ((2, 3, 2), {"flipped_axes": (0, 2)}, False),
    ((3, 4), {"mixing": "below"}, False),
    ((2, 3, 4), {"position_type": "learned"}, False),
    ((3, 2, 2), {}, False),
    ((2, 3, 2), {**TEXT, "position_type": "sincos"}, True),
    ((1, 3, 2), {}, False),
]


def forwards(of) -> list[int]:
    """Tokens fed in each forward of the backbone from now on."""
    fed: list[int] = []
    of.model.register_forward_hook(lambda module, args, output: fed.append(args[0].shape[1]))
    return fed


@pytest.mark.parametrize(("grid", "changes", "padded"), CASES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_decoding_uses_the_logits_of_the_training_forward(grid, changes, padded, guidance) -> None:
    of = model(grid, **changes)
    if guidance != 1 and not of.config.has_null:
        return
    given = condition(of, padded=padded)
    out = of.generate(
        **given,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        num_return_sequences=2 if not given else 1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        trained = of(out.sequences, **given).logits
    torch.testing.assert_close(out.logits.flatten(1, -2), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("grid", "passes"), [((16, 16), 31), ((32, 32), 63), ((4, 16, 16), 34), ((14, 14), 27)])
def test_forwards_of_published_grids(grid, passes) -> None:
    of = model(grid, num_hidden_layers=1)
    fed = forwards(of)
    out = of.generate(torch.tensor([1]), return_dict_in_generate=True)
    assert len(fed) == out.forward_passes == front_count(grid) == passes
    assert fed == [1, *map(len, fronts(grid)[:-1])], "the prefix, then every front but the last"
    assert out.sequences.shape == (1, *grid)
    assert out.tokens_per_pass == pytest.approx(torch.Size(grid).numel() / passes)


def test_every_small_grid_takes_a_forward_a_front() -> None:
    of2, of3 = model((2, 2), num_hidden_layers=1), model((2, 2, 2), num_hidden_layers=1)
    of2.config.grid_size, of3.config.grid_size = None, None
    for sizes in [*product(range(1, 6), repeat=2), (1, 1, 1), (5, 1, 1), (1, 5, 2), (3, 1, 4), (5, 5, 5)]:
        of = of2 if len(sizes) == 2 else of3
        of.config.grid_size = sizes
        fed = forwards(of)
        of.generate(torch.tensor([0]), guidance_scale=1)
        assert len(fed) == sum(sizes) - len(sizes) + 1


@pytest.mark.parametrize("sizes", [*product(range(1, 7), repeat=2), (2, 3, 4), (1, 2, 1)])
def test_the_schedule_and_the_decoder_have_the_same_fronts(sizes) -> None:
    schedule = NARSchedule(sizes)
    places = {cell: index for index, cell in enumerate(product(*map(range, sizes)))}
    steps = list(schedule)
    assert len(steps) == schedule.passes
    assert [[places[cell] for cell in step.yields] for step in steps] == [
        cells.tolist() for cells, _ in nar.front_plans(sizes)
    ]
    assert [step.feeds for step in steps] == [(), *(step.yields for step in steps[:-1])]
    pass_of = schedule.production()
    assert all(pass_of[places[cell]] == number for number, step in enumerate(steps, 1) for cell in step.yields)


@torch.no_grad()
def by_the_rule(of, given, guidance) -> torch.Tensor:
    """Greedy decoding without a cache, cell by cell from the definition."""
    rows, columns = of.config.grid_size
    prefix, valid = of.model.condition(**given, guided=guidance != 1)
    ids = torch.zeros(len(prefix) // (2 if guidance != 1 else 1), rows, columns, dtype=torch.long)
    start = prefix.shape[1]
    for front in fronts((rows, columns)):
        doubled = ids.repeat(2 if guidance != 1 else 1, 1, 1)
        embeddings = torch.cat([prefix, of.model.tok_embeddings(doubled.flatten(1))], dim=1)
        places = torch.arange(embeddings.shape[1])
        states = of.model(embeddings, places, None, of._mask((rows, columns), valid))
        right, below = (of.outputs[head](of.norms[head](state)) for head, state in enumerate(states))
        for row, column in front:
            found = []
            if column > 0:
                found.append(right[:, start + row * columns + column - 1])
            if row > 0:
                found.append(below[:, start + (row - 1) * columns + column])
            mean = torch.stack(found or [right[:, start - 1], below[:, start - 1]]).mean(0)
            if guidance != 1:
                c, u = mean.chunk(2)
                mean = u + guidance * (c - u)
            ids[:, row, column] = mean.argmax(-1)
    return ids


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_fast_path_is_the_general_rule(guidance) -> None:
    of = model((1, 1), num_hidden_layers=1)
    for sizes in product(range(1, 7), repeat=2):
        of.config.grid_size = sizes
        fast = of.generate(**condition(of), temperature=0, guidance_scale=guidance)
        assert torch.equal(fast, by_the_rule(of, condition(of), guidance)), sizes


def test_the_fast_path_of_padded_texts_is_the_general_rule() -> None:
    of = model((3, 4), **TEXT)
    given = condition(of, padded=True)
    fast = of.generate(**given, temperature=0, guidance_scale=2.0)
    assert torch.equal(fast, by_the_rule(of, given, 2.0))


def test_guidance_of_one_is_a_single_batch_and_the_interval_ends_it() -> None:
    of = model((3, 3))
    rows: list[int] = []
    of.model.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    labels = torch.tensor([1, 2])
    plain = of.generate(labels, temperature=0, guidance_scale=1)
    assert rows == [2] * 5
    never = of.generate(labels, temperature=0, guidance_scale=50.0)
    assert rows[5:] == [4] * 5
    assert not torch.equal(plain, never)
    # The first cell is still guided, as in the authors' code: no token is there before it.
    only_first = of.generate(labels, temperature=0, guidance_scale=50.0, cfg_interval=0)
    assert torch.equal(only_first[:, 0, 0], never[:, 0, 0])
    assert torch.equal(of.generate(labels, temperature=0, guidance_scale=50.0, cfg_interval=9), never)


def test_default_guidance_follows_the_kind_of_model() -> None:
    defaults = {
        2.0: model((2, 2)),
        1.25: model((2, 2, 2)),
        7.5: model((2, 2), **TEXT),
        1.0: model((2, 2), condition_dropout=0.0),
    }
    assert all(of.config.default_guidance == value for value, of in defaults.items())


def test_draws_are_reproducible_and_follow_the_filters() -> None:
    of = model((3, 3))
    labels = torch.tensor([1, 2])

    def draw(seed, **options):
        return of.generate(labels, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    greedy = of.generate(labels, temperature=0)
    assert torch.equal(draw(0, top_k=1), greedy)
    assert torch.equal(draw(0, top_p=1e-6), greedy)
    assert torch.equal(draw(0, temperature=1e-4), greedy)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), state), "a generator leaves the global state alone"


def test_several_samples_of_each_condition_lie_together() -> None:
    of = model((2, 3))
    out = of.generate(torch.tensor([1, 2]), temperature=0, num_return_sequences=2)
    single = of.generate(torch.tensor([1, 2]), temperature=0)
    assert torch.equal(out, single.repeat_interleave(2, 0))


def test_another_grid_goes_with_rotary_positions_only() -> None:
    with pytest.warns(UserWarning, match="trained for \\(2, 2\\)"):
        assert model((2, 2)).generate(torch.tensor([1]), grid_size=(3, 4)).shape == (1, 3, 4)
    with pytest.raises(ValueError, match="learned positions for \\(2, 2, 2\\) only"):
        model((2, 2, 2), position_type="learned").generate(torch.tensor([1]), grid_size=(2, 2, 3))


def test_half_precision_mixes_in_float32() -> None:
    of = model((2, 2)).to(torch.bfloat16)
    of.head_logits = lambda head, normed: torch.full((*normed.shape[:2], 20), 6e4, dtype=torch.float16)
    out = of.generate(torch.tensor([1]), output_logits=True, return_dict_in_generate=True)
    assert out.logits.dtype == torch.float32 and bool((out.logits == 6e4).all()), "fp16 ends at 65,504"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, "from 1, which is no guidance"),
        ({"guidance_scale": float("nan")}, "from 1, which is no guidance"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"temperature": float("nan")}, "must not be negative"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"cfg_interval": -2}, "cfg_interval=-2"),
        ({"cfg_interval": True}, "cfg_interval=True must be"),
        ({"cfg_interval": 3, "guidance_scale": 1}, "ends guidance, and there is none"),
        ({"num_return_sequences": 0}, "at least 1"),
        ({"grid_size": (2, 2, 2)}, "must have 2 axes"),
        ({"grid_size": (2, 0)}, "at least 1 token"),
        ({"class_labels": torch.tensor([5])}, "null class is for guidance"),
        ({"class_labels": torch.tensor([-1])}, "from 0 to 4"),
        ({"class_labels": torch.tensor([[1]])}, r"must be \[batch\]"),
        ({"class_labels": None}, "give class_labels"),
        ({"text_mask": torch.ones(1, 3)}, "text_mask goes with text_features"),
        ({"num_return_sequences": 1.5}, "at least 1"),
        ({"grid_size": 4}, "must have 2 axes"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 images"),
        ({"generator": 7}, "must be a torch.Generator"),
    ],
)
def test_bad_requests(options, message) -> None:
    of = model((2, 2))
    fed = forwards(of)
    with pytest.raises(ValueError, match=message):
        of.generate(**{"class_labels": torch.tensor([1]), **options})
    assert not fed, "before the first forward"


@pytest.mark.parametrize("kind", ["class", "text", "none"])
def test_a_sample_of_a_batch_is_the_one_that_its_generator_makes_alone(kind) -> None:
    of = model((3, 4), condition=kind, condition_tokens=7 if kind == "text" else 1)
    given, several = condition(of), {"none": {"num_return_sequences": 3}}.get(kind, {})
    samples = 3 if kind == "none" else len(next(iter(given.values())))
    seeds = range(samples)
    together = of.generate(**given, **several, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    assert samples > 1 and len(together.flatten(1).unique(dim=0)) == samples
    for seed in seeds:
        own = {name: each[seed : seed + 1] for name, each in given.items()}
        assert torch.equal(of.generate(**own, generator=torch.Generator().manual_seed(seed))[0], together[seed])


def test_guidance_needs_a_null_condition() -> None:
    for of in (model((2, 2), condition="none"), model((2, 2), condition_dropout=0.0)):
        with pytest.raises(ValueError, match="without a null condition"):
            of.generate(**condition(of), guidance_scale=2.0)


def test_a_generator_elsewhere_is_refused() -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="the generator is on cuda, the model on cpu"):
        model((2, 2)).generate(torch.tensor([1]), generator=Elsewhere())


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(nar).failed == 0


def test_what_is_decoded_can_be_trained_on() -> None:
    out = model((3, 4)).generate(**condition(model((3, 4))), output_logits=True, return_dict_in_generate=True)
    assert not out.sequences.is_inference() and not out.logits.is_inference()


def test_logits_that_are_no_numbers_are_named() -> None:
    of = model((3, 4))
    torch.nn.init.constant_(of.outputs[0].weight, torch.nan)
    with pytest.raises(ValueError, match="not a number"):
        of.generate(**condition(of))
