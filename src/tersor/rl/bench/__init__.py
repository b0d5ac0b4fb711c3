"""Measurements of ZipR1 on tiny-vlm."""
