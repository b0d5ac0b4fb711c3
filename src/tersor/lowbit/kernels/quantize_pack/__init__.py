"""Codes of numbers whose minima and steps are known already, packed as they are computed.

The elementwise half of the affine codec: ``u = clamp(round((x / c - m) / s), 0, 2**bits - 1)``, written half-split.
Every back end gives the same bytes, so that a cache does not depend on where it was encoded.
"""
