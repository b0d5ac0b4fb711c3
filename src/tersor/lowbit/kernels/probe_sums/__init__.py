"""Attention that each token gets from a sample of rows, without the rows themselves in memory."""
