"""Raster image models of other packages: how each is fed, what a call may ask for, and the decoder of all orders."""
