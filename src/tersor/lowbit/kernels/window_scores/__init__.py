"""Attention that a few new tokens give to the tokens of a window, written where it is kept, in one launch.

A `steps` tensor ``[batch, 1 + kept, scopes + 1, slots]`` holds what single decoding steps gave to the window's tokens:
row 0 sums up the older steps, the others keep the latest ones apart, so that they can be taken back. The last scope
counts the steps that see a token.
"""
