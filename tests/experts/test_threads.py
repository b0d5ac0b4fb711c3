"""Several threads and tasks on one host: each is answered by its own expert, and nobody by one that is gone."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tuned_models import IDS, NAMES, logits

from tersor.experts.config import ExpertBusyError, UnknownExpertError
from tersor.experts.continuous import continuous_batching
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import ExpertHost

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def test_four_threads_get_what_single_runs_get(host: ExpertHost) -> None:
    asked = [name for name in (*NAMES, None) for _ in range(6)]

    def answer(name: str | None) -> list[int]:
        return host.generate(input_ids=IDS[:1], expert_names=name, **GREEDY)[0].tolist()

    wanted = [answer(name) for name in asked]
    assert len({tuple(each) for each in wanted}) == 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, asked)) == wanted


def test_a_forward_pass_beside_a_block_is_not_in_it(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    with host.use("math") as model, ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model).result(), logits(merged[None]))
        assert not torch.equal(logits(model), logits(merged[None]))


def test_tasks_of_one_thread_are_each_their_own_expert(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    async def answer(name: str | None) -> torch.Tensor:
        with host.use(name) as model:
            await asyncio.sleep(0)  # the other one enters its block meanwhile
            return logits(model)

    async def both() -> list[torch.Tensor]:
        return await asyncio.gather(answer("math"), answer("code"), answer(None))

    for name, found in zip(("math", "code", None), asyncio.run(both()), strict=True):
        assert torch.allclose(found, logits(merged[name]), atol=1e-4)


def test_an_expert_that_is_set_meanwhile_answers_after_the_block(host: ExpertHost, merged: dict[Any, Any]) -> None:
    host.set_expert("chat")
    with host.use("math") as model:
        for change in (lambda: host.set_expert("code"), host.disable_experts, host.close):
            with pytest.raises(ValueError, match="inside `use`"):
                change()
        other = threading.Thread(target=host.set_expert, args=("code",))
        other.start()
        other.join()
        assert torch.allclose(logits(model), logits(merged["math"]), atol=1e-4)
    host.unload_expert("chat")
    assert torch.allclose(logits(host.model), logits(merged["code"]), atol=1e-4)
    with pytest.raises(ExpertBusyError):
        host.unload_expert("code")
    host.disable_experts()
    host.unload_expert("code")
    assert torch.equal(logits(host.model), logits(merged[None]))
    with pytest.raises(UnknownExpertError):
        host.set_expert("code")


def test_generate_answers_as_set_unless_told_otherwise(host: ExpertHost) -> None:
    wanted = {name: host.generate(input_ids=IDS, expert_names=name, **GREEDY).tolist() for name in (*NAMES, None)}
    assert host.generate(input_ids=IDS, **GREEDY).tolist() == wanted[None]
    host.set_expert("math")
    assert host.generate(input_ids=IDS, **GREEDY).tolist() == wanted["math"]
    assert host.generate(input_ids=IDS, expert_names=None, **GREEDY).tolist() == wanted[None]
    with host.use(["code", "chat", None, "math"]):
        rows = host.generate(input_ids=IDS, **GREEDY).tolist()
    assert rows == [wanted[name][row] for row, name in enumerate(("code", "chat", None, "math"))]


def test_loading_and_asking_at_once_never_answers_as_the_base(deltas: dict[str, ExpertDelta], host: ExpertHost) -> None:
    """An expert that can be named is ready: all of its modules are in place."""
    wanted = {name: host.generate(input_ids=IDS[:1], expert_names=name, **GREEDY).tolist() for name in NAMES}
    fresh = ExpertHost(host.merge("math").__class__(host.model.config).eval(), max_resident=2)
    fresh.model.load_state_dict(host.model.state_dict())
    wrong = []

    def ask(name: str) -> None:
        for _ in range(4):
            fresh.load_expert(f"{name}-{threading.get_ident()}", deltas[name])
            found = fresh.generate(input_ids=IDS[:1], expert_names=f"{name}-{threading.get_ident()}", **GREEDY)
            wrong.extend([name] * (found.tolist() != wanted[name]))
            fresh.unload_expert(f"{name}-{threading.get_ident()}")

    threads = [threading.Thread(target=ask, args=(name,)) for name in NAMES[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_host_with_a_running_batch_says_so(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    host.set_expert("chat")
    settings = {"num_blocks": 16, "max_batch_tokens": 64, "page_size": 16}
    with continuous_batching(host, **settings):
        with pytest.raises(ExpertBusyError, match="continuous batch runs"):
            host.generate(input_ids=IDS[:1], expert_names="math", **GREEDY)
        with pytest.raises(ExpertBusyError, match="already"), continuous_batching(host, **settings):
            pass
    assert torch.allclose(logits(host.model), logits(merged["chat"]), atol=1e-4)
