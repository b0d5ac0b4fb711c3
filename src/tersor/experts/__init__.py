"""ME-Switch: many fine-tuned experts as one base and packed weight deltas (arXiv 2406.09041)."""
