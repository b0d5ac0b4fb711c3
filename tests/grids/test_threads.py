"""Several calls at once on one model give what each gives alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tersor.grids.nar.heads import NARConfig, NARForImageGeneration


def same_as_alone(jobs: list) -> None:
    """Run what each job makes in four threads, three times over."""
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(job) for _ in range(3) for job in jobs]
        for number, job in enumerate(together):
            assert torch.equal(job.result(), alone[number % len(jobs)])


def test_every_way_to_decode_a_raster_model(case) -> None:
    inputs = [case.inputs(batch, False) for batch in (1, 2)]
    jobs = []
    for given in inputs:
        for seed in (0, 1):
            drawn = {"do_sample": True, "top_k": 20}

            def zipar(given=given, seed=seed, drawn=drawn):
                generator = torch.Generator().manual_seed(seed)
                return case.zipar(given, window_size=2, generator=generator, **drawn).sequences

            def speculative(given=given, seed=seed, drawn=drawn):
                generator = torch.Generator().manual_seed(seed)
                return case.speculative(given, generator=generator, **drawn).sequences

            jobs += [zipar, speculative]
        jobs.append(lambda given=given: case.raster(given, 1.0))
    same_as_alone(jobs)


@pytest.mark.parametrize("grid", [(4, 5), (2, 3, 4)])
def test_nar(grid) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_classes": 5}
    model = NARForImageGeneration(NARConfig(**sizes, grid_size=grid, initializer_range=0.3)).eval()
    for head in model.outputs:
        torch.nn.init.normal_(head.weight, std=0.3)

    def draw(seed):
        return model.generate(torch.tensor([seed, 3]), generator=torch.Generator().manual_seed(seed))

    same_as_alone([lambda seed=seed: draw(seed) for seed in range(4)])
