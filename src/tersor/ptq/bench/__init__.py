"""Measurements of RepAPQ: accuracy beside its rivals, and speed."""
