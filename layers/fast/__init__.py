"""Faster versions of plain parts. `engine.fast_parts.use_fast_parts` puts them into a model,
and compares them with the plain parts.

Values and gradients are those of the plain parts up to rounding. Fast dropout draws other random numbers than torch's
dropout, but torch's seed determines them.
"""
