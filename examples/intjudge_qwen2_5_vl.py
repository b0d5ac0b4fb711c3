"""Train Qwen2.5-VL to judge: accelerate launch examples/intjudge_qwen2_5_vl.py --arena run/ --out judge/.

`tersor train intjudge` does the same, resumes, and reports before and after; this is how the parts are put together, to
be changed. The run is one whose battles people decided; pairs from references lie in another one.
"""

import argparse
from pathlib import Path

import torch

from tersor.opening import Store
from tersor.opening.intjudge.config import IntJudgeConfig
from tersor.opening.intjudge.evaluation import decide
from tersor.opening.intjudge.lora import adapters, load_base
from tersor.opening.intjudge.pairs import read_source, split
from tersor.opening.intjudge.trainer import IntJudgeTrainer
from tersor.opening.judging.adapter import Facts, write_facts
from tersor.opening.judging.local import LocalJudge
from tersor.opening.prompts import JudgePrompt
from tersor.zoo.loading import load_processor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-7B-Instruct")
parser.add_argument("--arena", required=True)
parser.add_argument("--references")
parser.add_argument("--judge", default="human", help="whose verdicts the arena's are")
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--pairs", type=int, default=16, help="of an update and process")
args = parser.parse_args()

sources = []
for run, judge, kind in ((args.arena, args.judge, "arena"), (args.references, "reference", "reference")):
    if run is not None:
        with Store.open(run) as store:
            sources.append(read_source(store, judge, kind))
parts = split(sources, held_out=0.2)
print(
    f"{len(parts.training)} pairs to train on, {len(parts.validation)} to validate on; left out: {dict(parts.dropped)}"
)

prompt, on_gpu = JudgePrompt(side=512), torch.cuda.is_available()
processor = load_processor(args.model)
config = IntJudgeConfig(
    output_dir=args.out,
    max_steps=args.steps,
    # A pair in its two orders at a time, several pairs an update.
    per_device_train_batch_size=2,
    gradient_accumulation_steps=args.pairs,
    learning_rate=1e-4,
    gradient_checkpointing=on_gpu,
    save_steps=50,
    report_to=[],
)
trainer = IntJudgeTrainer(
    load_base(args.model),
    parts.training,
    config,
    prompt,
    processing_class=processor,
    peft_config=adapters(16),
)
trainer.train()
trainer.model.save_pretrained(f"{args.out}/adapter", save_embedding_layers=False)
write_facts(Path(args.out) / "adapter", Facts(prompt=prompt))
found = decide(LocalJudge(trainer.model, processor, prompt, name=args.model), parts.validation).agreement()
print(f"agrees in {found.value:.1%} [{found.low:.1%}, {found.high:.1%}] of battles: {args.out}/adapter")
