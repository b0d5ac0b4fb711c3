"""Measurements of KV caches: recall, loss, layouts, merging, and sparse prefills of pictures."""
