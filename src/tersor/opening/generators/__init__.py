"""Generators: what answers instances in texts and pictures."""
