"""Scripts that compare the results of runs."""
