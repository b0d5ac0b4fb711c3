"""Model, optimizer and training loop of tiny-lm; resumes from an atomically written state file."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm.data import Books, batch
from shared import run
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

BYTES = 256
EOS, PAD = 256, 257
WATCH = 0.1  # weight of `watch_loss`
RARE_BYTES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ[]{}="


@dataclass(frozen=True)
class Phase:
    """A stretch of the training on sequences of one length.

    Args:
        length: Bytes of a sequence.
        size: Sequences a step.
        rows: Sequences that a worker computes at a time.
        steps: Optimizer steps.
        dense: From 0 to 1, moves the data from prose towards dense recall.
        noise: Largest noise on keys and values, in standard deviations of a channel; each row draws its share of it.
        rate: Replaces the plan's multiplier of the learning rate, for phases after its decay.
    """

    length: int
    size: int
    rows: int
    steps: int
    dense: float
    noise: float = 0.0
    rate: float | None = None


@dataclass(frozen=True)
class Plan:
    """Phases and learning rate; the rate warms up, stays, and decays over the last share of all steps."""

    phases: tuple[Phase, ...]
    rate_peak: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.35  # the last share of all steps, over which the rate falls to nearly zero

    @property
    def steps(self) -> int:
        return sum(p.steps for p in self.phases)

    def phase_at(self, step: int) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def rate(self, step: int) -> float:
        """Multiplier of the learning rate: warm-up, constant, linear decay to 2 %; or the phase's own."""
        own = self.phase_at(step).rate
        if own is not None:
            return own
        steps = sum(phase.steps for phase in self.phases if phase.rate is None)
        up = min(1.0, (step + 1) / self.warmup)
        down = min(1.0, (steps - step) / max(1.0, self.decay * steps))
        return up * max(0.02, down)


@dataclass
class Progress(run.Progress):
    """Progress with the first losses and the state of the global generator."""

    losses: list[float] = field(default_factory=list)
    rng: Tensor | None = None


def new_model(seed: int, *, hidden: int = 128, layers: int = 8) -> LlamaForCausalLM:
    """The untrained model, a pure function of ``seed``."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=BYTES + 2,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=4096,
        # Slow frequencies tell places a thousand bytes apart as the same, which recall by content needs.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    structured_start(model)
    return model


@torch.no_grad()
def structured_start(
    model: LlamaForCausalLM, *, sharpness: float = 20.0, match: float = 2.0, copy: float = 30.0, watch: float = 1.0
) -> None:
    """Start with a working induction circuit; training on an hour of CPU does not find it from a random start.

    The residual stream is cut into four blocks of 32. Embeddings hold a random code of the byte in block 0 (its
    dimension 0 is a shared constant, its dimension 1 tells digits, capitals and brackets from the rest). Layer 0: head
    h attends to the byte h + 1 places back, by one RoPE phase made from the constant, and writes its code to block
    h + 1. Layer 1: queries project blocks 0-2 and keys blocks 1-3 with the same random maps onto the slow RoPE
    frequencies, so that a place matches where the same three bytes stood just before, and the heads copy the code found
    there to block 0, which the tied output reads. The last head of layer 1 looks, from everywhere, at runs of rare
    bytes (`watch_loss` keeps it there).
    """
    config, block = model.config, 32
    size, heads, kv_heads, std = (
        config.head_dim, config.num_attention_heads, config.num_key_value_heads, config.initializer_range,
    )  # fmt: skip
    half, group, eye = size // 2, heads // kv_heads, torch.eye(block)
    eye[0, 0] = 0.0  # the constant is not part of the code
    rare = torch.tensor([chr(b) in RARE_BYTES for b in range(BYTES)] + [False] * (config.vocab_size - BYTES))

    # Equal norms: the phase score grows with the norm of the key, and must not prefer some bytes.
    embedding = model.get_input_embeddings().weight
    for part, scale in ((slice(1, block), std), (slice(block, None), 0.1 * std)):
        codes = embedding[:, part]
        embedding[:, part] = codes / codes.norm(dim=1, keepdim=True).clamp_min(1e-9) * scale * codes.shape[1] ** 0.5
    embedding[:, 0] = 3 * std
    embedding[:, 1] = torch.where(rare, 2 * std, -2 * std)
    rms = embedding[0].pow(2).mean().sqrt()

    first, second = (layer.self_attn for layer in model.model.layers[:2])
    for layer in model.model.layers[:2]:
        layer.mlp.down_proj.weight.mul_(0.1)
        layer.self_attn.o_proj.weight.zero_()
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.mul_(0.1)
        for g in range(kv_heads):
            layer.self_attn.v_proj.weight[g * size : (g + 1) * size, :block] = eye

    fast, gain = 6, sharpness * rms / embedding[0, 0]
    theta = model.model.rotary_emb.inv_freq[:fast]
    for g in range(kv_heads):
        first.k_proj.weight[g * size : g * size + fast, 0] = gain
    for h in range(heads):
        column = first.q_proj.weight[h * size : (h + 1) * size, 0]
        column[:fast] = gain * torch.cos((h + 1) * theta)
        column[half : half + fast] = -gain * torch.sin((h + 1) * theta)
    for h in range(3):
        first.o_proj.weight[block * (h + 1) : block * (h + 2), h * size : (h + 1) * size] = eye * rms

    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, size)])
    for j in range(3):
        maps = match * torch.randn(kv_heads, len(slow), block) / block**0.5
        maps[..., :2] = 0.0
        for h in range(heads - 1):
            second.q_proj.weight[h * size + slow, block * j : block * (j + 1)] = maps[h // group]
        for g in range(kv_heads):
            second.k_proj.weight[g * size + slow, block * (j + 1) : block * (j + 2)] = maps[g]
    for h in range(heads - 1):
        second.o_proj.weight[:block, h * size : (h + 1) * size] = eye * std * copy / (heads - 1)

    # One slow dimension of the last head: its query is constant, its key counts rare bytes among the last four.
    second.q_proj.weight[heads * size - half - 1] = 0.0
    second.q_proj.weight[heads * size - half - 1, 0] = watch
    second.k_proj.weight[kv_heads * size - half - 1] = 0.0
    second.k_proj.weight[kv_heads * size - half - 1, 1 + block * torch.arange(4)] = watch
    # The neighbour head in the same group must not see that dimension.
    second.q_proj.weight[(heads - 1) * size - half - 1] = 0.0


def watch_loss(model: LlamaForCausalLM, tokens: torch.Tensor, rows: int = 32) -> torch.Tensor:
    """How far the last head of layer 1 is from looking evenly at all runs of rare bytes, in nats (a KL divergence).

    Large models have heads that look at what is rare and informative wherever they read; saliency metrics rest on them.
    Left to itself a model this small gives up its one such head within a few hundred steps, and then a fact draws no
    attention before it is asked for. ``rows`` random places of ``tokens`` ``[batch, length]`` are looked at.
    """
    body, length = model.model, tokens.shape[1]
    size = model.config.head_dim
    hidden = body.embed_tokens(tokens)
    cos, sin = body.rotary_emb(hidden, torch.arange(length)[None])
    second = body.layers[1]
    hidden = second.input_layernorm(body.layers[0](hidden, attention_mask=None, position_embeddings=(cos, sin)))
    query, key = (
        projection(hidden)[:, None, :, -size:] for projection in (second.self_attn.q_proj, second.self_attn.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    places = torch.randint(length, (rows,))
    seen = torch.arange(length) <= places[:, None]
    scores = (query[:, 0, places] @ key[:, 0].transpose(-1, -2) * size**-0.5).masked_fill(~seen, -torch.inf)
    runs = rare_runs(tokens)[:, None] & seen
    count = runs.sum(-1)
    inside = scores.log_softmax(-1).masked_fill(~runs, 0.0).sum(-1) / count.clamp_min(1)
    some = count > 0
    return (-(inside + count.clamp_min(1).log()) * some).sum() / some.sum().clamp_min(1)


def rare_runs(tokens: torch.Tensor) -> torch.Tensor:
    """Where the last four bytes are all rare ones, as inside ``[[KX=4827]]``: bool ``[batch, length]``."""
    rare = torch.isin(tokens, torch.tensor(list(RARE_BYTES.encode())))
    return torch.stack([F.pad(rare, (back, 0))[:, : tokens.shape[1]] for back in range(4)]).all(0)


def noisy_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """SDPA on keys and values with noise: what rounds them later must not be the first disturbance they meet.

    Large models tolerate rounding because much of what they do is redundant; this teaches a small one some of that.
    Layer 0 is left alone, since its heads do nothing but count places.
    """
    if module.layer_idx > 0 and torch.is_grad_enabled():
        share = NOISE[0] * torch.rand(key.shape[0], 1, 1, 1)
        key = key + share * key.detach().std(2, keepdim=True) * torch.randn_like(key)
        value = value + share * value.detach().std(2, keepdim=True) * torch.randn_like(value)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


NOISE = [0.0]  # of the current phase; the attention function has no other way to learn it
AttentionInterface.register("noisy", noisy_attention)
AttentionMaskInterface.register("noisy", sdpa_mask)


class Workers:
    """Single-threaded replicas that share the weights and take micro-batches from one queue.

    A core that is busy elsewhere then only does less, whereas two OpenMP threads would wait for each other
    at every operation.
    """

    def __init__(self, model: LlamaForCausalLM, n: int, *, compile_model: bool, noise: float = 0.0) -> None:
        self.noise = NOISE[0] = noise
        torch._dynamo.reset()  # replicas of an earlier phase would count towards the limit of recompilations
        self.replicas = [model] + [copy.deepcopy(model) for _ in range(n - 1)]
        for replica in self.replicas[1:]:
            for mine, shared in zip(replica.parameters(), model.parameters(), strict=True):
                mine.data = shared.data
        for replica in self.replicas:
            replica.set_attn_implementation("noisy" if noise else "sdpa")
        self.forwards = [torch.compile(r, dynamic=False) if compile_model else r for r in self.replicas]
        self.warm: set[tuple[int, ...]] = set()
        self.pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(self, tokens: torch.Tensor, weights: torch.Tensor, rows: int) -> float:
        """Leave the gradient of the weighted mean loss (nats) in the model; `rows` sequences at a time."""
        total = weights[:, 1:].sum()
        work: queue.SimpleQueue[tuple[torch.Tensor, torch.Tensor]] = queue.SimpleQueue()
        parts = list(zip(tokens.split(rows), weights.split(rows), strict=True))
        if (shape := tuple(parts[0][0].shape)) not in self.warm:  # compilation is not thread-safe
            for i in range(len(self.forwards)):
                self._backward(i, *parts[0], total)
                self.replicas[i].zero_grad()
            self.warm.add(shape)
        for part in parts:
            work.put(part)
        loss = sum(self.pool.map(lambda i: self._drain(i, work, total), range(len(self.replicas))))
        for replica in self.replicas[1:]:
            for mine, theirs in zip(self.replicas[0].parameters(), replica.parameters(), strict=True):
                if theirs.grad is not None:
                    mine.grad = theirs.grad if mine.grad is None else mine.grad.add_(theirs.grad)
                    theirs.grad = None
        return loss

    def _drain(self, i: int, work: queue.SimpleQueue, total: torch.Tensor) -> float:
        loss = 0.0
        while True:
            try:
                tokens, weights = work.get_nowait()
            except queue.Empty:
                return loss
            loss += self._backward(i, tokens, weights, total)

    def _backward(self, i: int, tokens: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> float:
        logits = self.forwards[i](input_ids=tokens[:, :-1], use_cache=False).logits
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        share = weights[:, 1:].sum() / total
        loss = (nats * weights[:, 1:].flatten()).sum() / total
        (loss + WATCH * share * watch_loss(self.replicas[i], tokens)).backward()
        return loss.item()


class Trainer:
    """Runs a plan; everything that a resumed run needs lives in `state`."""

    def __init__(
        self, books: Books, plan: Plan, seed: int, state: Path, *, threads: int = 2, compile_model: bool = True
    ) -> None:
        self.books, self.plan, self.seed = books, plan, seed
        self.model = new_model(seed)
        self.threads, self.compile_model = threads, compile_model
        self.workers = Workers(self.model, threads, compile_model=compile_model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=plan.rate_peak, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.kept = run.Run(state, plan, seed, self.model, self.optimizer, Progress())
        self.progress = self.kept.progress
        if self.progress.rng is not None:
            torch.set_rng_state(self.progress.rng)

    def train_step(self) -> float:
        """One optimizer step; returns the weighted loss in nats."""
        step, phase = self.progress.step, self.plan.phase_at(self.progress.step)
        tokens, weights = batch(
            self.books.train, seed=self.seed, step=step, length=phase.length, size=phase.size, dense=phase.dense
        )
        if phase.noise != self.workers.noise:
            self.workers = Workers(self.model, self.threads, compile_model=self.compile_model, noise=phase.noise)
        loss = self.workers.gradients(torch.from_numpy(tokens), torch.from_numpy(weights), phase.rows)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        run.set_rate(self.optimizer, self.plan.rate_peak * self.plan.rate(step))
        self.optimizer.step()
        self.model.zero_grad()
        return loss

    def run(self, *, look: Callable[[Trainer, float], None], look_every: int) -> None:
        """Train to the end of the plan; `look` (evaluation, display) is called every look_every steps."""
        recent: list[float] = []
        while self.progress.step < self.plan.steps:
            loss = self.kept.advance(self.train_step)
            recent.append(loss)
            if len(self.progress.losses) < 20:
                self.progress.losses.append(round(loss, 5))
            done = self.progress.step == self.plan.steps
            if self.progress.step % look_every == 0 or done:
                look(self, sum(recent) / len(recent))
                recent = []
            self.progress.rng = torch.get_rng_state()
            self.kept.save(now=done)
