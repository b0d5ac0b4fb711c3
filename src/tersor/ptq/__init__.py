"""RepAPQ: post-training quantization of reparameterized CNNs (arXiv 2402.16121)."""
