"""Depth: whether cache layers keep their own tokens or share directions."""
