"""Prefill: how a prompt attends, densely or among selected tokens."""
