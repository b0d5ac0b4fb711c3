"""Two fine-tuned Mistrals on one base: python examples/experts_mistral.py "How many eggs are in 7 dozen?".

Each expert is packed once, about 2.3 GB instead of 14.5, and then all of them answer in one batch.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tersor
from tersor.experts.delta import MANIFEST, local_folder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question")
parser.add_argument("--base", default="mistralai/Mistral-7B-v0.1")
parser.add_argument(
    "--expert",
    nargs="+",
    default=["chat=HuggingFaceH4/mistral-7b-sft-beta", "math=meta-math/MetaMath-Mistral-7B"],
    help="NAME=CHECKPOINT of full fine-tunings of the base",
)
parser.add_argument("--calibration", type=Path, nargs="*", default=[], help="NAME.txt for each, a text a line")
parser.add_argument("--out", type=Path, default=Path("bank"))
parser.add_argument("--max-new-tokens", type=int, default=128)
args = parser.parse_args()

texts = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in args.calibration}
experts = dict(pair.split("=", 1) for pair in args.expert)
base = local_folder(args.base)
for name, checkpoint in experts.items():
    if not (args.out / name / MANIFEST).is_file():
        # Without texts of the expert's own domain, channels are chosen by weights alone; a warning says so.
        delta = tersor.compress_expert(base, local_folder(checkpoint), calibration=texts.get(name), on_progress=print)
        delta.save_pretrained(args.out / name)
        print(f"{name}: {delta.nbytes / 1e9:.3f} GB")

tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map="auto")
host = tersor.ExpertHost(model)
for name in experts:
    host.load_expert(name, args.out / name)

names = [*experts, None]
inputs = tokenizer([args.question] * len(names), return_tensors="pt").to(model.device)
with torch.inference_mode():
    out = host.generate(**inputs, expert_names=names, max_new_tokens=args.max_new_tokens, do_sample=False)
for name, row in zip(names, out, strict=True):
    print(f"{name or 'base'}: {tokenizer.decode(row[inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
report = host.memory_report()
print(f"{report.total / 1e9:.3f} GB instead of {(1 + len(experts)) * report.base / 1e9:.3f}")
