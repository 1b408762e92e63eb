"""Faster versions of plain parts. `engine.fast_parts.use_fast_parts` puts them into a model, and compares them with
the plain ones. Values and gradients are the same up to rounding. Dropout draws other random numbers than torch's, and
torch's seed determines them.
"""
