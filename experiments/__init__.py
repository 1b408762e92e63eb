"""Scripts that compare runs."""
