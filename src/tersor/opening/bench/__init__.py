"""Measurements of the arena."""
