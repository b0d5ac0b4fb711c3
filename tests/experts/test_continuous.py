"""Experts in one running batch answer as each does alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import build
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.scheduler import FIFOScheduler
from tuned_models import tuned

from tersor import _compat
from tersor._errors import UnsupportedError
from tersor.experts.compress import compress_expert
from tersor.experts.config import ExpertBusyError, UnknownExpertError
from tersor.experts.continuous import ExpertBatch, continuous_batching
from tersor.experts.host import ExpertHost
from tersor.experts.linear import PackedRoutes
from tersor.experts.server.batching import StaticBatcher, batcher_named

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")

TOKENS = 8
NAMES: list[str | None] = ["one", "two", "norm", None]


@pytest.fixture(scope="module")
def host() -> Iterator[ExpertHost]:
    base = build("llama")
    experts = {"one": tuned(base, 1), "two": tuned(base, 2), "norm": tuned(base, 3, only="model.norm", size=0.5)}
    deltas = {name: compress_expert(base, expert) for name, expert in experts.items()}
    host = ExpertHost(base)
    for name, delta in deltas.items():
        host.load_expert(name, delta)
    yield host
    host.close()


def prompts(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(n)
    lengths = torch.randint(3, 20, (n,), generator=generator).tolist()
    return [torch.randint(2, 190, (length,), generator=generator).tolist() for length in lengths]


def alone(host: ExpertHost, prompt: list[int], expert: str | None) -> list[int]:
    out = host.generate(torch.tensor([prompt]), expert_names=[expert], max_new_tokens=TOKENS, do_sample=False)
    return out[0, len(prompt) :].tolist()


def together(host: ExpertHost, asked: list[tuple[list[int], str | None]], **settings: Any) -> list[list[int]]:
    with continuous_batching(host, num_blocks=64, max_batch_tokens=48, page_size=16, **settings) as batch:
        names = [batch.add_request(prompt, expert, max_new_tokens=TOKENS) for prompt, expert in asked]
        found = {}
        while len(found) < len(names):
            output = batch.manager.get_result(timeout=60)
            assert output is not None
            assert output.error is None
            found[output.request_id] = output.generated_tokens
    return [found[name] for name in names]


def test_each_request_gets_its_experts_answer(host: ExpertHost) -> None:
    """More requests than one step takes, so that prompts are cut and requests join others that are decoding."""
    asked = [(prompt, NAMES[number % len(NAMES)]) for number, prompt in enumerate(prompts(16))]
    assert together(host, asked) == [alone(host, *each) for each in asked]


def test_one_prompt_for_all_experts(host: ExpertHost) -> None:
    """With blocks of the cache shared by prompt, later ones would read keys of another expert."""
    prompt = prompts(1)[0] * 4
    answers = together(host, [(prompt, name) for name in NAMES])
    assert answers == [alone(host, prompt, name) for name in NAMES]
    assert len({tuple(each) for each in answers}) == len(NAMES)


def test_a_prompt_that_is_cut_to_one_token_keeps_heads_apart(host: ExpertHost) -> None:
    """Three tokens of three requests, two of which yield logits: the head is given others than the blocks are."""
    head, block = host.model.get_output_embeddings(), host.model.model.layers[0].mlp.up_proj
    one, two = host.hold("one"), host.hold("two")
    routes = PackedRoutes([one, two, None], [one, None, None], head, torch.device("cpu"))
    assert routes.of(block, 3).experts == [one, two, None]
    assert routes.of(head, 3).experts == [one, None, None]
    with pytest.raises(ValueError, match="a pass of 2 tokens"):
        routes.of(block, 2)
    host.release("one")
    host.release("two")


def test_experts_are_free_again(host: ExpertHost) -> None:
    together(host, [(prompts(1)[0], "one")])
    assert all(entry.running == 0 for entry in host._bank.entries())
    assert host._switch.routes is None
    with continuous_batching(host, num_blocks=64, max_batch_tokens=48, page_size=16) as batch:
        name = batch.add_request(prompts(1)[0], "one", max_new_tokens=400, request_id="long")
        with pytest.raises(ExpertBusyError):
            host.unload_expert("one")
        with pytest.raises(ValueError, match="'long' is in use"):
            batch.add_request([3, 4], "two", request_id="long")
        with pytest.raises(UnknownExpertError):
            batch.add_request([3, 4], "three")
        batch.cancel_request(name)
        batch.manager.get_result(batch.add_request([3, 4, 5], "two", max_new_tokens=2), timeout=60)
        assert {entry.name: entry.running for entry in host._bank.entries()} == {"one": 0, "two": 0, "norm": 0}


def test_a_request_for_several_sequences_is_refused(host: ExpertHost) -> None:
    config = type(host.model.generation_config)(num_return_sequences=2, do_sample=True)
    with (
        pytest.raises(ValueError, match="must be 1"),
        continuous_batching(host, num_blocks=8, max_batch_tokens=8, generation_config=config),
    ):
        pass


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ContinuousBatchingManager, "_create_batch_processor"),
        (ContinuousBatchingIOs, "prepare_batch_tensors"),
        (FIFOScheduler, "clear_cancelled_requests"),
        (OutputRouter, "deliver"),
        (OutputRouter, "deliver_batch"),
    ],
)
def test_a_library_without_a_private_part_is_refused_at_entry(
    host: ExpertHost, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, value: str | None
) -> None:
    """In one line, and the model reads as before."""
    before = host.model.config._attn_implementation
    host.model.set_attn_implementation("eager")  # which the library replaces
    home = next(each for each in owner.__mro__ if name in vars(each))
    if value is None:
        monkeypatch.setattr(home, name, None)
    else:
        monkeypatch.delattr(home, name)
    with (
        pytest.raises(UnsupportedError, match=rf"^experts .*\b{name}\(\) of .*: use ExpertHost\.generate.*$"),
        continuous_batching(host, num_blocks=8, max_batch_tokens=8),
    ):
        pass
    left = host.model.config._attn_implementation
    host.model.set_attn_implementation(before)
    assert left == "eager"
    assert host._switch.routes is None


def test_a_step_that_is_prepared_elsewhere_is_an_error_and_no_answer_of_the_base(
    host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpertBatch, "_route", lambda *_: None)
    with continuous_batching(host, num_blocks=64, max_batch_tokens=48, page_size=16) as batch:
        batch.add_request(prompts(1)[0], "one", max_new_tokens=TOKENS)
        output = batch.manager.get_result(timeout=60)
    assert output is not None
    assert "experts of (0, 0) tokens are known" in output.error


@pytest.mark.parametrize("release", ["5.19.4", "5.25.0", "6.1"])
def test_a_release_that_was_not_tested_is_refused_and_auto_takes_static_batches(
    host: ExpertHost, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    monkeypatch.setattr(_compat, "version", {"transformers": release}.__getitem__)
    said = rf"^[^\n]*transformers {re.escape(release)}: use ExpertHost\.generate[^\n]*$"
    with pytest.raises(UnsupportedError, match=said), continuous_batching(host, num_blocks=4, max_batch_tokens=32):
        pass
    settings: dict[str, Any] = {"places": 2, "tokens": 64, "step_tokens": 32, "wait": 0.0, "session": None}
    assert isinstance(batcher_named("auto", host, **settings), StaticBatcher)
    with pytest.raises(UnsupportedError):
        batcher_named("continuous", host, **settings)
