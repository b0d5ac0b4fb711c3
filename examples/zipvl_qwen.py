"""A picture and a question, with a sparser prefill: python examples/zipvl_qwen.py photo.jpg "What is this?"."""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tersor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture")
parser.add_argument("question")
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct")
parser.add_argument("--tau", type=float, default=0.975, help="share of the attention that must be held")
parser.add_argument("--policy", default="evict", help="'quantize' or 'keep' for several questions about one picture")
parser.add_argument("--dense-layers", type=int, default=1, help="first layers that stay dense; the paper has 0")
parser.add_argument("--max-new-tokens", type=int, default=128)
args = parser.parse_args()

processor = AutoProcessor.from_pretrained(args.model)
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.bfloat16, device_map="auto")

content = [{"type": "image"}, {"type": "text", "text": args.question}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
)
picture = Image.open(args.picture).convert("RGB")
inputs = processor(text=[prompt], images=[picture], return_tensors="pt").to(model.device)

recipe = tersor.ZipVL(tau=args.tau, policy=args.policy, skip_layers=tuple(range(args.dense_layers)))
with recipe.on(model) as session:
    out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
stats = session.stats

print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(
    f"{stats.token_ratio:.1%} of {stats.tokens[0]} tokens took part, {stats.visual_ratio:.1%} of those of the picture"
)
print(f"{stats.attn_flops_reduction_exact:.1%} of the prompt's attention operations saved")
print(f"cache: {stats.kv_bytes / 2**20:.1f} MiB instead of {stats.kv_dense_bytes / 2**20:.1f} MiB")
