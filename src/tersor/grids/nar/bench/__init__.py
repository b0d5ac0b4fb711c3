"""Measurements of NAR: distances, class accuracy and passes beside raster and PAR."""
