"""Measurements of ZipAR: distances, class accuracy and speed by window."""
