"""ZipR1: post-training that teaches a vision-language model to need fewer tokens (arXiv 2504.18579).

A core that needs no trainer (`zipr1_rewards`, `group_advantages`, `multi_budget_generate`, `soft_token_ratio`), and
`ZipR1Trainer` on trl's GRPO.
"""

from tersor._lazy import members

_HOMES = {
    "Rewards": "tersor.rl.rewards",
    "Rollouts": "tersor.rl.rollout",
    "RowThresholds": "tersor.kv.engine.state",
    "VERIFIERS": "tersor.rl.verifiers",
    "ZipR1Config": "tersor.rl.config",
    "ZipR1Trainer": "tersor.rl.trainer",
    "budgets": "tersor.rl.rollout",
    "find_verifier": "tersor.rl.verifiers",
    "group_advantages": "tersor.rl.rewards",
    "multi_budget_generate": "tersor.rl.rollout",
    "soft_count": "tersor.rl.sparsity",
    "soft_token_ratio": "tersor.rl.sparsity",
    "zipr1_rewards": "tersor.rl.rewards",
}
__all__ = sorted(_HOMES)

__getattr__, __dir__ = members(__name__, _HOMES)
