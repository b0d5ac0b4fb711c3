"""Small routers of every kind, and requests to train them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from tersor.experts.router.config import RouterConfig
from tersor.experts.router.kinds import RulesScorer, load_backbone
from tersor.experts.router.routing import Router
from tersor.experts.router.training import Request, RouterTraining, train_router

EXPERTS = {"math": "word problems", "code": "programs", "chat": "talk"}


RULES = {"math": [r"\d", "sum"], "code": ["def ", "python"], "chat": ["hello"]}


REQUESTS = [
    Request(f"{start} {word}", expert)
    for expert, words in {
        "math": ("12+3", "7-5"),
        "code": ("def f", "import"),
        "chat": ("hello", "how are you"),
    }.items()
    for word in words
    for start in ("please,", "now", "well:")
]


MODELS: dict[str, Any] = {
    "llm": LlamaForCausalLM,
    "encoder": LlamaForSequenceClassification,
    "embedding": LlamaModel,
}


def rules(**settings: Any) -> Router:
    return Router(RouterConfig(kind="rules", experts=EXPERTS, **settings), RulesScorer(RULES, list(EXPERTS)))


def trained(folders: dict[str, Path], kind: str, *, steps: int = 60, rate: float = 1e-2, **more: Any) -> Router:
    config = RouterConfig(kind=kind, experts=EXPERTS, max_tokens=160)
    return train_router(
        config, *load_backbone(kind, folders[kind], len(EXPERTS)), REQUESTS,
        RouterTraining(steps=steps, batch=12, rate=0.3 if kind == "embedding" else rate), **more,
    )  # fmt: skip
