"""DragAnything: entities of a picture are moved along paths (arXiv 2403.07420)."""
