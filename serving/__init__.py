"""Models in use: bundles and recommendations from them."""
