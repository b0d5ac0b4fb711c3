"""ZipR1 on trl: the same sparse model in rollouts and loss, a dense reference, rows that keep their thresholds."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from zipr1 import GRID, MODEL, config, data, policy

from tersor import zoo
from tersor.rl import sparsity
from tersor.rl.rewards import group_advantages
from tersor.rl.trainer import ROW_GATE, ROW_LOGPROBS, ROW_TAU, ZipR1Trainer
from tersor.rl.verifiers import exact_match

pytestmark = pytest.mark.filterwarnings("ignore:beta=0")


def trainer(folder: Path, *, verifier: Any = exact_match, rows: int = 8, lora: bool = False, **settings: Any):
    peft_config = None
    if lora:
        peft = pytest.importorskip("peft")
        peft_config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    net = policy(folder)
    for name, weight in net.named_parameters():
        weight.requires_grad_("visual" not in name)
    return ZipR1Trainer(
        net, verifier, config(folder, **settings), train_dataset=data(rows),
        processing_class=zoo.load_processor(MODEL), peft_config=peft_config,
    )  # fmt: skip


def batch(made: ZipR1Trainer, rows: int = 1) -> dict[str, Any]:
    """What trl makes of some questions, four rollouts each."""
    made.model.train()
    inputs = [dict(made.train_dataset[index]) for index in range(rows) for _ in range(4)]
    made.current_gradient_accumulation_steps = 1
    return made._generate_and_score_completions(inputs)


def undecided(text: str, answer: Any) -> float:
    """Right for about half of what a model says."""
    return float(sum(map(ord, text)) % 2)


def test_every_row_of_a_batch_has_its_threshold_and_its_measured_reward(tmp_path: Path) -> None:
    made = trainer(tmp_path, verifier=undecided)
    found = batch(made, 2)
    assert found[ROW_TAU].tolist() == GRID * 2
    ratios = torch.tensor(made.session.stats.per_row, dtype=torch.float64).reshape(2, 4)
    assert (ratios.diff(dim=1) >= 0).all() and (ratios[:, 0] < ratios[:, 3]).all()
    rewards = made._rewards
    able = (rewards.performance.reshape(2, 4) > 0.5).any(1).repeat_interleave(4).double()
    assert found[ROW_GATE].tolist() == able.tolist()
    assert rewards.efficiency.tolist() == pytest.approx((able * (1 - ratios.reshape(-1))).tolist(), abs=1e-9)


@pytest.mark.parametrize("objective", ["literal", "pathwise"])
def test_advantages_are_those_of_the_objectives_reward(tmp_path: Path, objective: str) -> None:
    """The ratio is in the paper's advantages, and would only be noise in ours."""
    made = trainer(tmp_path, verifier=undecided, objective=objective)
    found = batch(made, 2)
    rewards = made._rewards
    wanted = group_advantages(rewards.total if objective == "literal" else rewards.performance, 4)
    torch.testing.assert_close(found["advantages"].double(), wanted, rtol=1e-4, atol=1e-4)


def test_right_answers_are_never_pushed_away_where_that_is_asked_for(tmp_path: Path) -> None:
    made = trainer(tmp_path, verifier=lambda text, answer: 1.0, objective="literal", correct_advantage="nonneg")
    assert batch(made)["advantages"].min() == 0.0
    signed = trainer(tmp_path, verifier=lambda text, answer: 1.0, objective="literal")
    assert batch(signed)["advantages"].min() < 0.0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_sees_the_model_that_answers_were_drawn_from(tmp_path: Path, lora: bool, checkpointing: bool) -> None:
    made = trainer(tmp_path, lora=lora, gradient_checkpointing=checkpointing, max_steps=2, temperature=1.0)
    made.train()
    differences = [row["logprob_difference"] for row in made.state.log_history if "logprob_difference" in row]
    assert len(differences) == 2 and max(differences) < 1e-5
    assert all(row["soft_token_ratio"] < 1 for row in made.state.log_history if "soft_token_ratio" in row)


def test_another_padding_gives_the_same_log_probabilities(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    found = batch(made)
    padded = dict(found)
    for name, value in (("prompt_ids", made._tokenizer.pad_token_id), ("prompt_mask", 0)):
        padded[name] = torch.nn.functional.pad(found[name], (5, 0), value=value)
    padded["mm_token_type_ids"] = torch.nn.functional.pad(found["mm_token_type_ids"], (5, 0))
    losses = []
    for inputs in (found, padded):
        made._metrics["train"].clear()
        losses.append(made._compute_loss(made.model, inputs).item())
        assert made._metrics["train"]["logprob_difference"][0] < 1e-5
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_dense_and_knows_no_threshold(tmp_path: Path, lora: bool) -> None:
    made = trainer(tmp_path, lora=lora, objective="literal")
    found = batch(made)
    net = zoo.load_model(MODEL)
    ids = torch.cat([found["prompt_ids"], found["completion_ids"]], 1)
    keep = found["completion_ids"].shape[1]
    inputs = {name: found[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
    with torch.no_grad():
        logits = net(input_ids=ids, use_cache=False, **inputs).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][:, -keep:]
    said = found["completion_mask"].bool()
    torch.testing.assert_close(found["ref_per_token_logps"][said], expected[said], rtol=1e-5, atol=1e-5)


def test_the_divergence_is_zero_where_attention_is_dense_and_positive_where_it_is_not(tmp_path: Path) -> None:
    for tau, low, high in ((1.0, -1e-6, 1e-6), (0.3, 1e-6, math.inf)):
        made = trainer(tmp_path, thresholds=[tau], eval_threshold=tau, efficiency_weight=0.0)
        found = batch(made)
        made._compute_loss(made.model, found)
        assert low <= made._metrics["train"]["kl"][0] <= high
        made.close()


def steps(folder: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    made = trainer(folder, verifier=undecided, max_steps=3, **settings)
    made.train()
    made.close()
    return {name: weight.detach() for name, weight in made.model.named_parameters()}, made.state.log_history


def test_without_its_weight_the_pathwise_objective_is_accuracy_alone_step_by_step(tmp_path: Path) -> None:
    alone, _ = steps(tmp_path, efficiency_weight=0.0, objective="literal")
    pathwise, _ = steps(tmp_path, efficiency_weight=0.0, objective="pathwise")
    assert all(torch.equal(alone[name], weight) for name, weight in pathwise.items())
    moved, _ = steps(tmp_path, objective="pathwise")
    assert not all(torch.equal(alone[name], weight) for name, weight in moved.items())


def test_a_group_that_is_all_right_has_no_gradient_but_that_of_its_ratio(tmp_path: Path) -> None:
    norms = {}
    for weight in (0.0, 1.0):
        made = trainer(tmp_path, verifier=lambda text, answer: 1.0, efficiency_weight=weight, beta=0.0)
        made._compute_loss(made.model, batch(made)).backward()
        layers = made.session.model.model.language_model.layers
        norms[weight] = [layer.self_attn.q_proj.weight.grad.norm().item() for layer in layers]
        made.close()
    assert max(norms[0.0]) == 0.0 and min(norms[1.0]) > 0.0


def test_a_closed_gate_leaves_the_ratio_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path, verifier=lambda text, answer: 0.0, beta=0.0)
    made._compute_loss(made.model, batch(made)).backward()
    assert made.session.model.model.language_model.layers[0].self_attn.q_proj.weight.grad.norm() == 0.0
    opened = trainer(tmp_path, verifier=lambda text, answer: 0.0, beta=0.0, gate="none")
    opened._compute_loss(opened.model, batch(opened)).backward()
    assert opened.session.model.model.language_model.layers[0].self_attn.q_proj.weight.grad.norm() > 0.0


def test_parts_of_a_batch_keep_their_rows_thresholds(tmp_path: Path) -> None:
    """Rollouts are shuffled, split over updates, and read in parts where old log-probabilities are needed."""
    made = trainer(
        tmp_path, per_device_train_batch_size=2, generation_batch_size=8, num_generations=4, max_steps=4,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    seen: list[tuple[Any, ...]] = []
    compute = made._compute_loss

    def watched(model: Any, inputs: dict[str, Any]) -> Any:
        assert {"old_per_token_logps", ROW_TAU, ROW_LOGPROBS} <= inputs.keys()
        mask = inputs["completion_mask"].bool()
        difference = (inputs["old_per_token_logps"] - inputs[ROW_LOGPROBS]).abs()[mask]
        assert difference.max() < 1e-5
        seen.extend(inputs[ROW_TAU].tolist())
        return compute(model, inputs)

    made._compute_loss = watched
    made.train()
    assert sorted(seen) == sorted(GRID * 2)


def test_evaluation_uses_its_own_threshold_for_every_row(tmp_path: Path) -> None:
    made = trainer(tmp_path, per_device_eval_batch_size=4, eval_strategy="no", eval_threshold=0.8)
    made.eval_dataset = data(2)
    found = made.evaluate()
    assert made.session.state.thresholds.tau.tolist() == [0.8] * 4
    assert 0 < found["eval_token_ratio"] < 1


def test_a_session_that_lost_its_hooks_stops_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    found = batch(made)
    made.session.disable()
    with pytest.raises(RuntimeError, match="sparsely"):
        made._compute_loss(made.model, found)


def test_a_model_that_differs_between_rollout_and_loss_stops_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=5)
    generate = made.rollouts

    def disturbed(prompts: Any) -> Any:
        found = generate(prompts)
        made._logprobs = [[each - 0.5 for each in row] for row in made._logprobs]
        return found

    made.rollouts = disturbed
    with pytest.raises(RuntimeError, match=r"log-probabilities of rollout and training differ by 0\.5"):
        made.train()
    assert made.state.global_step == 2


def test_an_update_that_would_leave_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = trainer(tmp_path), sparsity.soft_token_ratio
    before = {name: each.detach().clone() for name, each in made.model.named_parameters()}
    monkeypatch.setattr("tersor.rl.trainer.soft_token_ratio", lambda *args: real(*args) * torch.nan)
    with pytest.raises(RuntimeError, match="gradient of update 1 is NaN or infinite; lower learning_rate"):
        made.train()
    assert all(torch.equal(each, before[name]) for name, each in made.model.named_parameters())


def test_answers_that_cannot_be_judged_move_nothing(tmp_path: Path) -> None:
    made = trainer(tmp_path, verifier=lambda text, answer: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = batch(made)
    assert found["advantages"].abs().max() == 0.0 == found[ROW_GATE].max()


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    net, processor = policy(tmp_path), zoo.load_processor(MODEL)
    good = {"train_dataset": data(4), "processing_class": processor}
    with pytest.raises(TypeError, match="ZipR1Config"):
        ZipR1Trainer(net, **good)
    with pytest.raises(TypeError, match="verifier must be a function"):
        ZipR1Trainer(net, "exact", config(tmp_path), **good)
    with pytest.raises(ValueError, match="reward_funcs belongs to ZipR1"):
        ZipR1Trainer(net, args=config(tmp_path), reward_funcs=[len], **good)
    with pytest.raises(ValueError, match="train_dataset has no column answer"):
        ZipR1Trainer(net, args=config(tmp_path), **{**good, "train_dataset": data(4).remove_columns("answer")})
    peft = pytest.importorskip("peft")
    for prompts in (peft.PromptTuningConfig(num_virtual_tokens=2), peft.PrefixTuningConfig(num_virtual_tokens=2)):
        with pytest.raises(ValueError, match="before the prompt, which ZipVL cannot count; use LoRA"):
            ZipR1Trainer(net, args=config(tmp_path), peft_config=prompts, **good)


def test_what_is_saved_says_nothing_of_the_session(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.save_model(str(tmp_path / "saved"))
    assert "tersor" not in (tmp_path / "saved" / "config.json").read_text()
    before = copy.copy(made.session.model.config.text_config._attn_implementation)
    made.close()
    assert before == "tersor" and made.session.model.config.text_config._attn_implementation == "sdpa"
