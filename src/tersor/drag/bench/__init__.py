"""The measurements of DragAnything: a world of textured layers, and what a control map is worth in it."""
