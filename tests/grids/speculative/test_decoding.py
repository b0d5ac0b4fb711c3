"""The law of speculative decoding, against full enumeration of small images; and decoders that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from tersor.grids.geometry import RasterGrid
from tersor.grids.raster.adapters import Prefix, RasterAdapter
from tersor.grids.sampling import Sampler
from tersor.grids.speculative.config import SpeculativeConfig
from tersor.grids.speculative.decoding import SpeculativeDecoder
from tersor.grids.speculative.draws import Coupled, Grouped

pytestmark = pytest.mark.usefixtures("poison_empty")
PREFIX, IDS, CELLS = 2, 3, 6
FAST, SLOW, BATCH = 2_400, 20_000, 4
FIRST = ("above", "left", "random", "law above", "law left")


class Table(RasterAdapter):
    """A model without weights: logits are looked up by all tokens that a query sees.

    ``table``: ``[branches, cells, IDS ** cells, IDS]``; a wrong mask or a stale slot gives another entry.
    """

    max_positions = None

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def embed_image(self, ids: Tensor) -> Tensor:
        return ids[..., None].float()

    def logits(self, embeddings, positions, mask, cache, keep):
        held, _ = cache.update(embeddings[:, None], embeddings[:, None], 0)
        ids = held[:, 0, PREFIX:, 0].nan_to_num(7).long()
        weights = IDS ** torch.arange(ids.shape[1])
        seen = (mask[0, 0, keep, PREFIX:] == 0).long()
        codes = (ids * weights) @ seen.T
        cell = (positions[0, keep] - PREFIX + 1) if ids.shape[1] else torch.zeros(1, dtype=torch.long)
        codes = codes if ids.shape[1] else torch.zeros(len(embeddings), 1, dtype=torch.long)
        branch = torch.arange(len(self.table)).repeat_interleave(len(embeddings) // len(self.table))
        return self.table[branch[:, None], cell, codes]


def table(branches: int = 1, scale: float = 1.4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(branches, CELLS, IDS**CELLS, IDS, generator=generator)


def decode(entries: Tensor, config: SpeculativeConfig, batch: int, sampler: Sampler, columns: int = 3, **options):
    ids = torch.zeros(batch * len(entries), PREFIX, dtype=torch.long)
    prefix = Prefix.padded(ids[..., None].float(), torch.ones_like(ids, dtype=torch.bool), ids[:batch, :0])
    grid = RasterGrid(CELLS // columns, columns)
    return SpeculativeDecoder(config, grid, Table(entries), prefix, sampler, DynamicCache(), **options).run()


def exact_law(entries: Tensor, processors: list, guidance: float | None) -> Tensor:
    """Probability of each of the images, in the order of `itertools.product`."""
    found = []
    for image in product(range(IDS), repeat=CELLS):
        chance, code = 1.0, 0
        for cell, token in enumerate(image):
            scores = entries[:, cell, code]
            if guidance is not None:
                c, u = scores.log_softmax(-1)
                scores = (u + guidance * (c - u))[None]
            for each in processors:
                scores = each(torch.tensor([image[:cell]], dtype=torch.long), scores)
            chance *= scores.softmax(-1)[0, token].item()
            code += token * IDS**cell
        found.append(chance)
    return torch.tensor(found, dtype=torch.float64)


def draw(entries: Tensor, config: SpeculativeConfig, images: int, batch: int, processors=(), **options) -> Tensor:
    """Images ``[n, CELLS]``."""
    sampler = Sampler(list(processors), True, torch.Generator().manual_seed(1))
    runs = [decode(entries, config, batch, sampler, **options).ids for _ in range(-(-images // batch))]
    return torch.cat(runs)


def p_value(ids: Tensor, law: Tensor) -> float:
    """Chi-square test of images against their law; images that are expected less than five times count as one."""
    codes = (ids * IDS ** torch.arange(CELLS - 1, -1, -1)).sum(-1)
    seen, expected = torch.bincount(codes, minlength=len(law)).double(), len(ids) * law
    assert seen[law == 0].sum() == 0
    rare = expected < 5
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = ((seen - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), statistic / 2).item()


@pytest.mark.parametrize(("mode", "first_drafts", "window"), [("law", "above", 4), ("seed", "law left", 3)])
def test_images_follow_the_law_of_raster_decoding(mode, first_drafts, window) -> None:
    entries = table()
    config = SpeculativeConfig(mode=mode, first_drafts=first_drafts, window_size=window)
    assert p_value(draw(entries, config, 2 * FAST, BATCH), exact_law(entries, [], None)) > 1e-3


SETTINGS: dict[str, tuple[int, list, dict]] = {
    "plain": (1, [], {}),
    "cut": (1, [TopKLogitsWarper(2)], {}),
    "guided": (2, [], {"guidance": 3.0}),
    "repetition": (1, [RepetitionPenaltyLogitsProcessor(2.0)], {}),
}


MODES = [("seed", "above", 5), *(("law", each, 1 + number) for number, each in enumerate(FIRST))]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "batch"), [("plain", 1), *((each, BATCH) for each in SETTINGS)])
@pytest.mark.parametrize(("mode", "first_drafts", "window"), MODES)
def test_twenty_thousand_images_follow_the_law(mode, first_drafts, window, settings, batch) -> None:
    branches, processors, options = SETTINGS[settings]
    entries = table(branches, scale=0.7 if settings == "guided" else 1.4)
    law = exact_law(entries, processors, options.get("guidance"))
    config = SpeculativeConfig(mode=mode, first_drafts=first_drafts, window_size=window)
    assert p_value(draw(entries, config, SLOW, batch, processors, **options), law) > 1e-3


def test_two_images_of_a_batch_are_independent() -> None:
    # The first two cells of each stand for the whole.
    entries = table()
    law = exact_law(entries, [], None)
    config = SpeculativeConfig(mode="law", window_size=4)
    ids = draw(entries, config, 2 * FAST, 2).view(-1, 2, CELLS)[:, :, :2].flatten(1)
    pair = law.view(IDS**2, -1).sum(-1)
    joint = (pair[:, None] * pair).flatten()
    codes = (ids * IDS ** torch.arange(3, -1, -1)).sum(-1)
    expected = len(ids) * joint
    statistic = ((torch.bincount(codes, minlength=81) - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(40.0, dtype=torch.float64), statistic / 2) > 1e-3


def stale_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are tested against the law of their first draft."""
    honest = SpeculativeDecoder._decide

    def decide(self, ready, scores, law, kept):
        start = self.window.decided - self.begin
        honest(self, ready, scores, law if self.laws is None else self.laws[:, start:], kept)

    monkeypatch.setattr(SpeculativeDecoder, "_decide", decide)


def double_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept keeps its old law, and is tested again with it because another image of the batch was slower."""
    honest = SpeculativeDecoder._decide

    def decide(self, ready, scores, law, kept):
        if self.laws is not None:
            law = torch.where(kept[..., None], self.laws[:, self.window.decided - self.begin :], law)
        honest(self, ready, scores, law, kept)

    monkeypatch.setattr(SpeculativeDecoder, "_decide", decide)


def peeking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law that is noted for a draft knows which draft it is."""
    honest = SpeculativeDecoder._draft

    def draft(self, cells, origins):
        honest(self, cells, origins)
        places = [self.window.place(cell) for cell in cells]
        own = torch.nn.functional.one_hot(self.image[:, places], IDS)
        laws = self.laws[:, -len(cells) :] + own
        self.laws = torch.cat([self.laws[:, : -len(cells)], laws / laws.sum(-1, keepdim=True)], dim=1)

    monkeypatch.setattr(SpeculativeDecoder, "_draft", draft)


def from_the_whole_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that fails is drawn from p and not from what p has more than q."""
    honest = Coupled.test

    def test(self, law, drafts, before):
        found = honest(self, law, drafts, before)
        return torch.where(found == drafts, drafts, self.draw(law))

    monkeypatch.setattr(Coupled, "test", test)


WRONG: dict[str, tuple[Callable, str]] = {
    "stale laws": (stale_laws, "above"),
    "double tests": (double_tests, "above"),
    "a law that peeks": (peeking, "law above"),
    "no residual": (from_the_whole_law, "above"),
}


@pytest.mark.parametrize("images", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("spoil", "first_drafts"), WRONG.values(), ids=WRONG)
def test_a_wrong_decoder_does_not(monkeypatch, spoil, first_drafts, images) -> None:
    entries = table()
    spoil(monkeypatch)
    config = SpeculativeConfig(mode="law", first_drafts=first_drafts, window_size=4)
    assert p_value(draw(entries, config, images, BATCH), exact_law(entries, [], None)) < 1e-6


def test_groups_change_the_law() -> None:
    # All ids of this model are near each other, by rank and embedding, so a group is what is as likely.
    entries = table(scale=0.5)

    class Near(Grouped):
        def masses(self, law, before, drafts):
            self.embed = lambda ids: torch.zeros(*ids.shape, 1)
            return super().masses(law, before, drafts)

    law = exact_law(entries, [], None)
    config = SpeculativeConfig(mode="grouped", window_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.grids.speculative.decoding.Grouped", Near)
        assert p_value(draw(entries, config, FAST, BATCH), law) < 1e-6


def greedy_passes(entries: Tensor, window: int, columns: int = 3) -> list[int]:
    decoder_of = SpeculativeConfig(window_size=window, first_drafts="left")
    return decode(entries, decoder_of, 1, Sampler([], False), columns).forward_passes


def test_a_model_that_says_one_thing_takes_as_few_passes_as_windows() -> None:
    entries = torch.zeros(1, CELLS, IDS**CELLS, IDS)
    entries[..., 1] = 5
    for window in range(1, 7):
        assert greedy_passes(entries, window) == -(-(CELLS - 1) // window) + 1


def test_a_model_that_never_repeats_takes_a_pass_a_cell_and_is_right() -> None:
    entries = torch.zeros(1, CELLS, IDS**CELLS, IDS)
    code = torch.arange(IDS**CELLS)
    for cell in range(1, CELLS):
        last = code // IDS ** (cell - 1) % IDS
        entries[0, cell, code, (last + 1) % IDS] = 5
    config = SpeculativeConfig(window_size=1)
    expected = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert torch.equal(decode(entries, config, 1, Sampler([], False)).ids, expected)
    for window in (1, 2, 5):
        done = decode(entries, SpeculativeConfig(window_size=window, first_drafts="left"), 1, Sampler([], False))
        assert torch.equal(done.ids, expected)
        assert done.forward_passes <= CELLS
        assert window > 1 or done.forward_passes == CELLS
