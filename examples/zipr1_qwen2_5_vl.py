"""Teach Qwen2.5-VL to need fewer tokens: accelerate launch examples/zipr1_qwen2_5_vl.py --data train.jsonl --out run/.

`tersor train zipr1` does the same and reports before and after; this is how the parts are put together, to be changed.
The data is one JSON object a line: {"image": "1.png", "question": "Which …? A. … B. …", "answer": "B"}.
"""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor

from tersor.rl import ZipR1Config, ZipR1Trainer, find_verifier
from tersor.rl.data import check_prompts, load_questions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct")
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--verifier", default="choice", help="'exact', 'choice', 'number', or your module:function")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--questions", type=int, default=8, help="of an update and process")
parser.add_argument("--min-tokens", type=int, default=256, help="shorter prompts are read densely")
args = parser.parse_args()

processor = AutoProcessor.from_pretrained(args.model)
on_gpu = torch.cuda.is_available()
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
questions = load_questions(args.data)
print(f"{len(questions)} questions, up to {check_prompts(questions, processor, args.min_tokens)} tokens")

config = ZipR1Config(
    output_dir=args.out,
    max_steps=args.steps,
    # One question's rollouts at a time on a GPU, several questions an update.
    per_device_train_batch_size=8,
    num_generations=8,
    gradient_accumulation_steps=args.questions,
    learning_rate=1e-5,
    max_completion_length=64,
    gradient_checkpointing=on_gpu,
    zipvl={"min_tokens": args.min_tokens},
    save_steps=50,
    report_to=[],
)
adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", exclude_modules=r".*visual.*")
trainer = ZipR1Trainer(
    model,
    find_verifier(args.verifier),
    config,
    train_dataset=questions,
    processing_class=processor,
    peft_config=adapters,
)
trainer.train()
trainer.close()
trainer.save_model(f"{args.out}/model")
last = next(row for row in reversed(trainer.state.log_history) if "token_ratio" in row)
print(f"token ratio {last['token_ratio']:.1%}, right {last['rewards/performance/mean']:.1%}: {args.out}/model")
