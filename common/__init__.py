"""What every room needs and nothing depends on: user errors, atomic files, process groups."""
