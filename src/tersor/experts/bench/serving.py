"""What a batch of the server writes a second, and how soon: alone, together, joining, and with a compressed cache."""

from __future__ import annotations

import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tersor import zoo
from tersor.bench.measure import PairedTimes, time_paired
from tersor.experts.bench.skills import SKILLS, encode, examples
from tersor.experts.bench.speed import base_hashes, random_expert, random_model
from tersor.experts.compress import compress_expert
from tersor.experts.config import DeltaConfig
from tersor.experts.host import ExpertHost
from tersor.experts.server.batching import ContinuousBatcher, StaticBatcher
from tersor.experts.server.engine import Batcher, Engine, EngineSettings
from tersor.experts.server.jobs import Event, Job
from tersor.experts.server.sampling import Picked, Sampling
from tersor.kv.zipcache import ZipCache

MODEL = "tiny-experts"
ALONE, STATIC, CONTINUOUS, COMPRESSED = "one at a time", "static", "continuous", "static, ZipCache"
#: The prompts of the skills are shorter than what ZipCache compresses by default, so once it compresses all of them.
EVERY = "static, ZipCache of every token"
RECIPES = {COMPRESSED: ZipCache(), EVERY: ZipCache(min_tokens_to_compress=1, streaming_gap=4)}
#: Requests of a round, tokens of each answer, and seconds between two requests where they do not come at once.
REQUESTS, TOKENS, APART = 16, 48, 0.02
PROMPT, EOS = 12, 1


class Heard:
    """When each token of one answer came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        """As a job tells it."""
        if isinstance(event, Picked):
            self.times.append(time.perf_counter())
            self.tokens.append(event.token)
        else:
            self.over.set()


def ask(
    engine: Engine, prompts: Sequence[tuple[list[int], str | None]], tokens: int, *, apart: float = 0.0, ends: int = -1
) -> list[Heard]:
    """Have prompts answered; returns when all are.

    Args:
        engine: Who answers.
        prompts: Ids, and an expert each.
        tokens: Of each answer.
        apart: Seconds between two requests.
        ends: The token that ends an answer.
    """
    heard = [Heard() for _ in prompts]
    for (ids, expert), one in zip(prompts, heard, strict=True):
        engine.submit([Job(ids, expert, Sampling(), tokens, frozenset({ends}), one)])
        time.sleep(apart)
    for one in heard:
        one.over.wait()
    return heard


@dataclass
class BatchTimes:
    """Times of one pattern of arrivals: of whole rounds, and to the first token, a median a round."""

    rounds: PairedTimes
    first: dict[str, list[float]] = field(default_factory=dict)


def time_batches(*, apart: float, repeats: int, with_alone: bool) -> BatchTimes:
    """Time the same requests with each kind of batch, in turns.

    Args:
        apart: Seconds between two requests.
        repeats: Rounds.
        with_alone: Whether one request at a time is timed too.
    """
    drawn = [each for skill in SKILLS for each in examples(skill, REQUESTS // len(SKILLS), seed=5, held_out=True)]
    prompts = [((encode(each.prompt) * PROMPT)[:PROMPT], SKILLS[n % len(SKILLS)]) for n, each in enumerate(drawn)]
    kinds = [STATIC, CONTINUOUS, COMPRESSED, *([ALONE] if with_alone else [])]
    with ExitStack() as stack:
        engines = {kind: stack.enter_context(running(kind)) for kind in kinds}
        first: dict[str, list[float]] = {kind: [] for kind in kinds}

        def work(kind: str) -> Callable[[], None]:
            def together() -> None:
                came: list[float] = []
                began = time.perf_counter()
                if kind == ALONE:
                    for prompt in prompts:
                        start = time.perf_counter()
                        came += [ask(engines[kind], [prompt], TOKENS)[0].times[0] - start]
                else:
                    heard = ask(engines[kind], prompts, TOKENS, apart=apart)
                    came = [one.times[0] - began - n * apart for n, one in enumerate(heard)]
                first[kind].append(sorted(came)[len(came) // 2])

            return together

        rounds = time_paired({kind: work(kind) for kind in kinds}, repeats=repeats)
    return BatchTimes(rounds, {kind: each[-repeats:] for kind, each in first.items()})


@dataclass
class CacheBytes:
    """Bytes of the caches of all batches, and those that 16 bits a number would take."""

    packed: int = 0
    dense: int = 0

    @property
    def share(self) -> float:
        """The first over the second."""
        return self.packed / self.dense


def exact_answers(kind: str, n: int, *, seed: int, nbytes: CacheBytes | None = None) -> list[bool]:
    """Which of ``n`` held-out prompts of each skill are answered right by its expert.

    Args:
        kind: Of batch.
        n: Prompts of each skill.
        seed: Of the prompts.
        nbytes: The bytes of compressed caches are added to it.
    """
    asked = [(skill, each) for skill in SKILLS for each in examples(skill, n, seed=seed, held_out=True)]
    with running(kind, nbytes) as engine:
        found = ask(engine, [(encode(each.prompt), skill) for skill, each in asked], 12, ends=EOS)
    return [one.tokens == [*encode(each.answer), EOS] for one, (_, each) in zip(found, asked, strict=True)]


def bytes_of_long_prompts(kind: str, length: int) -> CacheBytes:
    """Bytes of a compressed cache of a batch of prompts of so many tokens; the text is many prompts of a skill."""
    nbytes, prompts = CacheBytes(), []
    for skill in SKILLS:
        text = "".join(each.prompt for each in examples(skill, length, seed=5, held_out=True))
        prompts += [(encode(text)[n * length : (n + 1) * length], skill) for n in range(REQUESTS // len(SKILLS))]
    with running(kind, nbytes) as engine:
        ask(engine, prompts, 4)
    return nbytes


@contextmanager
def measured(recipe: ZipCache, model: Any, nbytes: CacheBytes | None) -> Iterator[None]:
    """A session of one batch, whose cache is counted at its end."""
    with recipe.on(model) as session:
        yield
    if nbytes is not None and session.cache is not None:
        nbytes.packed += session.cache.memory_footprint()
        nbytes.dense += session.cache.dense_footprint()


@contextmanager
def running(kind: str, nbytes: CacheBytes | None = None) -> Iterator[Engine]:
    """An engine of the experts of tiny-experts on a host of its own."""
    base = zoo.load_model(MODEL)
    host = ExpertHost(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no calibration data")
        for name, model in zoo.load_experts(MODEL).items():
            host.load_expert(name, compress_expert(base, model), pin=True)
    made: Batcher
    if kind == CONTINUOUS:
        made = ContinuousBatcher(host, places=REQUESTS)
    else:
        recipe = RECIPES.get(kind)
        session: Any = {} if recipe is None else {"session": lambda: measured(recipe, base, nbytes)}
        made = StaticBatcher(host, places=REQUESTS, wait=0.0 if kind == ALONE else 0.01, **session)
    with Engine(host, made, EngineSettings(max_queue=10_000)) as engine:
        yield engine
    host.close()


@dataclass(frozen=True)
class ColdLoad:
    """Seconds between tokens of streams that run: while an expert is loaded, and otherwise; bytes of the expert."""

    during: list[float]
    otherwise: list[float]
    seconds: float
    nbytes: int


def time_cold_load(shape: str, *, streams: int, repeats: int, seed: int) -> ColdLoad:
    """Load an expert from files while streams of another one run, again and again.

    Args:
        shape: Of `speed.SHAPES`.
        streams: How many run.
        repeats: How often the expert is loaded.
        seed: Of the weights.
    """
    model = random_model(shape, seed=seed).float()  # which CPUs are faster in
    config, hashes = DeltaConfig(bits=8), base_hashes(model)
    host = ExpertHost(model)
    host.load_expert("warm", random_expert(model, config, seed=1, hashes=hashes), pin=True)
    cold = random_expert(model, config, seed=2, hashes=hashes)
    during: list[float] = []
    otherwise: list[float] = []
    took: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Engine(host, ContinuousBatcher(host, places=streams)) as engine:
        cold.save_pretrained(Path(folder) / "cold")
        for number in range(repeats):
            name = f"cold-{number}"
            host.load_expert(name, Path(folder) / "cold")
            heard = [Heard() for _ in range(streams)]
            engine.submit(
                [Job([3 + n] * PROMPT, "warm", Sampling(), 40, frozenset(), one) for n, one in enumerate(heard)]
            )
            while len(heard[0].times) < 15:
                time.sleep(0.001)
            began = time.perf_counter()
            host.hold(name)  # as the engine's loader does, in a thread beside the batch
            ended = time.perf_counter()
            host.release(name)
            for one in heard:
                one.over.wait()
                for before, after in pairwise(one.times[2:]):
                    (during if before < ended and after > began else otherwise).append(after - before)
            took.append(ended - began)
            host.unload_expert(name)
    host.close()
    return ColdLoad(during, otherwise, sorted(took)[len(took) // 2], cold.nbytes)
