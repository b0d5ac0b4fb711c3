"""Both kinds of batch: the same text, tokens as they come, and faults that hit nobody else for long."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import NAMES, make_batcher, make_host

from tersor import zoo
from tersor.experts.compress import compress_expert
from tersor.experts.host import ExpertHost
from tersor.experts.server.batching import ContinuousBatcher, StaticBatcher, batcher_named
from tersor.experts.server.engine import Engine
from tersor.experts.server.jobs import Ended, Event, Failure, Job
from tersor.experts.server.sampling import Sampling
from tersor.kv.zipcache import ZipCache

KINDS = [pytest.param("static", marks=pytest.mark.slow), "continuous"]
END = frozenset({1})


class Told:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end: Ended | Failure | None = None
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Ended | Failure):
            self.end = event
            self.over.set()
        else:
            self.tokens.append(event.token)


def ask(engine: Engine, *asked: tuple[list[int], str | None], new: int = 10, **sampling: Any) -> list[Told]:
    tells = [Told() for _ in asked]
    engine.submit(
        [
            Job(prompt, name, Sampling(**sampling), new, END, told)
            for (prompt, name), told in zip(asked, tells, strict=True)
        ]
    )
    return tells


def answers(tells: list[Told]) -> list[list[int]]:
    for told in tells:
        assert told.over.wait(30)
    return [told.tokens for told in tells]


def alone(host: ExpertHost, prompt: list[int], name: str | None, new: int = 10) -> list[int]:
    out = host.generate(torch.tensor([prompt]), expert_names=[name], max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (n,), generator=generator).tolist()
    return [torch.randint(4, 60, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def fresh(bank: Path) -> Iterator[ExpertHost]:
    host = make_host(bank)
    yield host
    host.close()


@pytest.fixture(params=KINDS)
def engine(request: Any, fresh: ExpertHost) -> Iterator[Engine]:
    with Engine(fresh, make_batcher(request.param, fresh, places=6)) as found:
        yield found


def free(engine: Engine) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not engine.running and not any(entry.running for entry in engine.host._bank.entries()):
            return True
        time.sleep(0.01)
    return False


def test_more_requests_than_places_are_each_answered_as_alone(engine: Engine, reference: ExpertHost) -> None:
    """Prompts of many lengths, five models, two waves: alone, in a batch, and after others it is the same."""
    names = (*NAMES, None)
    asked = [(prompt, names[n % 5]) for n, prompt in enumerate(prompts(14))]
    wanted = [alone(reference, *each) for each in asked]
    for _ in range(2):
        assert answers(ask(engine, *asked)) == wanted
    assert answers(ask(engine, asked[3])) == [wanted[3]]
    assert free(engine)


def test_one_prompt_for_all_experts_has_all_their_answers(engine: Engine, reference: ExpertHost) -> None:
    prompt = prompts(1)[0] * 3
    found = answers(ask(engine, *((prompt, name) for name in (*NAMES, None))))
    assert found == [alone(reference, prompt, name) for name in (*NAMES, None)]


def test_an_answer_ends_at_its_token_or_its_length(engine: Engine, reference: ExpertHost) -> None:
    prompt = reference.tokenizer(None)("bdac>")["input_ids"]
    (told,) = ask(engine, (prompt, "sort"), new=10)
    assert answers([told])[0][-1] == 1 and told.end == Ended("stop")
    (told,) = ask(engine, (prompt, "sort"), new=2)
    assert len(answers([told])[0]) == 2 and told.end == Ended("length")


def test_what_one_request_draws_changes_no_other(engine: Engine, reference: ExpertHost) -> None:
    prompt = prompts(1)[0]
    wild = ask(engine, *[(prompt, "add")] * 4, temperature=3.0, new=8)
    calm = ask(engine, (prompt, "add"), new=8)
    assert answers(calm) == [alone(reference, prompt, "add", 8)]
    assert len({tuple(each) for each in answers(wild)}) > 1
    first, again = (answers(ask(engine, (prompt, "add"), temperature=3.0, seed=7, new=8)) for _ in range(2))
    assert first == again


def test_a_cancelled_request_leaves_nothing_behind(engine: Engine) -> None:
    for _ in range(5):
        told = ask(engine, (prompts(1)[0], "add"), new=300, logit_bias={1: -100})[0]
        while not told.tokens:
            time.sleep(0.001)
        engine.cancel(next(iter(engine.running)))
    assert free(engine) and engine.alive


def broken(bank: Path) -> Any:
    """A delta whose numbers are finite, and whose answers are not."""
    base, expert = zoo.load("tiny-experts")[0], zoo.load_experts("tiny-experts")["add"]
    with torch.no_grad():
        expert.model.layers[0].mlp.up_proj.weight.mul_(1e30)
        expert.model.layers[0].mlp.down_proj.weight.mul_(1e30)
    return compress_expert(base, expert)


@pytest.mark.filterwarnings("ignore:no calibration data")
def test_an_expert_that_computes_no_numbers_is_found_and_asked_no_more(
    engine: Engine, bank: Path, reference: ExpertHost
) -> None:
    engine.host.load_expert("bad", broken(bank))
    good = [(prompt, NAMES[n % 3]) for n, prompt in enumerate(prompts(4))]
    tells = ask(engine, *good[:2], (prompts(1)[0], "bad"), *good[2:])
    answers(tells)
    bad = tells.pop(2)
    assert isinstance(bad.end, Failure) and (bad.end.status, bad.end.code) == (500, "expert_not_finite")
    for told, each in zip(tells, good, strict=True):
        failed = isinstance(told.end, Failure) and told.end.status == 503
        assert failed or told.tokens == alone(reference, *each), "right, or to be asked again"
    refused = engine.refused("bad")
    assert refused is not None and refused.code == "expert_not_finite" and engine.refused("add") is None
    assert answers(ask(engine, *good)) == [alone(reference, *each) for each in good], "nothing of it is left"
    assert free(engine)
    engine.host.unload_expert("bad")
    engine.host.load_expert("bad", bank / "sort")
    assert engine.refused("bad") is None, "another content of that name"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_batching_thread_comes_back_within_ten_seconds(fresh: ExpertHost, reference: ExpertHost) -> None:
    with Engine(fresh, ContinuousBatcher(fresh)) as engine:
        tells = ask(
            engine, *((prompt, NAMES[n % 4]) for n, prompt in enumerate(prompts(8))), new=200, logit_bias={1: -99}
        )
        while not all(told.tokens for told in tells):
            time.sleep(0.001)
        thread = engine.batcher._batch.manager._generation_thread  # type: ignore[attr-defined]
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        answers(tells)
        began = time.monotonic()
        assert {told.end.code for told in tells if isinstance(told.end, Failure)} == {"batch_stopped"}
        prompt = prompts(1)[0]
        assert answers(ask(engine, (prompt, "add"))) == [alone(reference, prompt, "add")]
        assert time.monotonic() - began < 10 and engine.restarts == 1
        assert free(engine)


def test_a_failed_static_batch_fails_its_requests_and_no_others(
    fresh: ExpertHost, reference: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(fresh, StaticBatcher(fresh)) as engine:
        generate = fresh.model.generate
        monkeypatch.setattr(fresh.model, "generate", lambda **_: (_ for _ in ()).throw(MemoryError("short")))
        (told,) = ask(engine, (prompts(1)[0], "add"))
        answers([told])
        assert isinstance(told.end, Failure) and told.end.code == "batch_failed"
        monkeypatch.setattr(fresh.model, "generate", generate)
        assert answers(ask(engine, (prompts(1)[0], "add"))) == [alone(reference, prompts(1)[0], "add")]
        assert engine.restarts == 0 and free(engine)


def test_static_batches_take_those_who_come_within_the_wait(fresh: ExpertHost, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    batcher = StaticBatcher(fresh, wait=0.3)
    inner = batcher._answer
    monkeypatch.setattr(batcher, "_answer", lambda engine, jobs: (batches.append(len(jobs)), inner(engine, jobs)))
    with Engine(fresh, batcher) as engine:
        tells = []
        for prompt in prompts(3):
            tells += ask(engine, (prompt, "add"))
            time.sleep(0.02)
        answers(tells)
    assert batches == [3]


def test_a_compressed_cache_runs_in_static_batches(fresh: ExpertHost, reference: ExpertHost) -> None:
    """In 16 bits throughout, it answers as the model's own cache does."""
    recipe = ZipCache(high_bits=8, low_bits=8, saliency_ratio=1.0)
    sessions: list[Any] = []

    def session() -> Any:
        sessions.append(recipe.on(fresh.model))
        return sessions[-1]

    asked = [(prompt, NAMES[n % 4]) for n, prompt in enumerate(prompts(5))]
    with Engine(fresh, StaticBatcher(fresh, session=session)) as engine:
        found = answers(ask(engine, *asked, new=4))
    assert found == [alone(reference, *each, 4) for each in asked] and sessions
    assert fresh.model.config._attn_implementation != "tersor"


def test_the_kind_is_chosen_by_name_and_by_what_is_possible(fresh: ExpertHost, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"places": 2, "tokens": 128, "step_tokens": 16, "wait": 0.0}
    assert isinstance(batcher_named("auto", fresh, session=None, **how), ContinuousBatcher)
    assert isinstance(batcher_named("static", fresh, session=None, **how), StaticBatcher)
    assert isinstance(batcher_named("auto", fresh, session=lambda: None, **how), StaticBatcher)
    with pytest.raises(ValueError, match="batching='static'"):
        batcher_named("continuous", fresh, session=lambda: None, **how)
    with pytest.raises(ValueError, match="'auto', 'continuous' or 'static'"):
        batcher_named("both", fresh, session=None, **how)
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    monkeypatch.delattr(ModelRunner, "_sample")
    assert isinstance(batcher_named("auto", fresh, session=None, **how), StaticBatcher)
    with pytest.raises(ValueError, match="_sample"):
        batcher_named("continuous", fresh, session=None, **how)


def test_a_prompt_longer_than_the_cache_is_known_before(fresh: ExpertHost) -> None:
    assert ContinuousBatcher(fresh, tokens=128).limit == 128
    assert ContinuousBatcher(fresh, tokens=4096).limit == StaticBatcher(fresh).limit == 512
    for wrong in ({"places": 0}, {"tokens": 8}, {"step_tokens": 4}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ContinuousBatcher(fresh, **wrong)
    with pytest.raises(ValueError, match="places=0"):
        StaticBatcher(fresh, places=0)
