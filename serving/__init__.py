"""Models in use: bundles."""
