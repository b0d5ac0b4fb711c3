"""PAR and raster videos: what NAR is compared with has to be right, too."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.grids.geometry import front_count
from tersor.grids.nar.baselines import PARConfig, PARForImageGeneration, RasterVideo, RasterVideoConfig, par_groups

SHAPE = {
    "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_classes": 5,
    "initializer_range": 0.3,
}  # fmt: skip
LABELS = torch.tensor([4, 1])


@pytest.fixture(params=[(2, 2), (2, 3)])
def par(request) -> PARForImageGeneration:
    torch.manual_seed(0)
    return PARForImageGeneration(PARConfig(**SHAPE, grid_size=(4, 6), regions=request.param)).eval()


@torch.no_grad()
def logits_of(of, ids) -> torch.Tensor:
    return of(ids, class_labels=LABELS).logits


def test_groups_are_the_papers() -> None:
    # Two by two parts of 1 by 2 cells: their first tokens in turn, then the second of all at once.
    assert par_groups(2, 4) == ((0,), (2,), (4,), (6,), (1, 3, 5, 7))
    assert len(par_groups(16, 16)) == 67, "PAR-4X's passes in both papers"
    for rows, columns in ((2, 2), (4, 6), (14, 14)):
        groups = par_groups(rows, columns)
        assert sorted(cell for group in groups for cell in group) == list(range(rows * columns))
        assert len(groups) == 4 + rows * columns // 4 - 1
    with pytest.raises(ValueError, match="multiple of regions=\\(2, 2\\)"):
        par_groups(3, 4)
    with pytest.raises(ValueError, match="multiple of regions=\\(3, 2\\)"):
        PARForImageGeneration(PARConfig(**SHAPE, grid_size=(4, 6), regions=(3, 2)))
    assert len(par_groups(14, 14, (7, 2))) == 14 + 14 * 14 // 14 - 1 == front_count((14, 14))


def test_decoding_is_what_was_trained(par) -> None:
    widths: list[int] = []
    par.layers[0].register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    out = par.generate(LABELS, guidance_scale=1.0, temperature=0)
    parts = math.prod(par.config.regions)
    assert widths == [1] * parts + [parts] * (24 // parts - 1) and out.forward_passes == len(par.groups) == len(widths)
    assert torch.equal(logits_of(par, out.sequences).argmax(-1).view(2, 4, 6), out.sequences)
    drawn = par.generate(LABELS, guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    assert drawn.sequences.shape == (2, 4, 6) and not torch.equal(drawn.sequences, out.sequences)


def test_nothing_leaks_from_a_pass_or_a_later_one(par) -> None:
    ids = torch.randint(0, 20, (2, 24), generator=torch.Generator().manual_seed(1))
    before = logits_of(par, ids)
    for number, group in enumerate(par.groups):
        later = ids.clone()
        hidden = [cell for each in par.groups[number:] for cell in each]
        later[:, hidden] = (later[:, hidden] + 1) % 20
        torch.testing.assert_close(logits_of(par, later)[:, list(group)], before[:, list(group)])
        if number:
            earlier = ids.clone()
            earlier[:, par.groups[number - 1][-1]] += 1
            changed = logits_of(par, earlier % 20)[:, list(group)]
            assert (changed - before[:, list(group)]).abs().max() > 1e-4


def test_training_drops_classes_and_learns(par) -> None:
    ids = torch.randint(0, 20, (2, 24), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(par.parameters(), lr=1e-2)
    par.train()
    losses = []
    for _ in range(40):
        losses.append(par(ids, class_labels=LABELS, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 4
    assert torch.equal(par.eval().generate(LABELS, guidance_scale=1.0, temperature=0).sequences.flatten(1), ids)


def test_raster_videos_decode_what_they_were_trained_for() -> None:
    torch.manual_seed(0)
    of = RasterVideo(RasterVideoConfig(**SHAPE, grid_size=(6, 2), frames=2)).eval()
    ids = of.generate(LABELS, guidance_scale=1.0, do_sample=False)
    assert ids.shape == (2, 12)
    assert torch.equal(logits_of(of, ids)[:, :12].argmax(-1), ids)
    # Cells (frame, row, column) and (frame, row', column): the same but for the row's channels.
    cosine, sine = (each[0, :, 0] for each in of.rotation(torch.arange(13)[None]))
    assert (cosine[0] == 0).all() and torch.equal(cosine[1], torch.ones(16)) and (sine[:2] == 0).all()
    assert not torch.equal(cosine[7], cosine[1]), "the second frame"
