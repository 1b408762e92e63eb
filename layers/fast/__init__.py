"""Faster versions of plain parts. `apply.use_fast_parts` puts them into a model, and checks them against the plain
ones. Values and gradients are the same up to rounding. Dropout draws other random numbers than torch's, from torch's
seed.
"""
