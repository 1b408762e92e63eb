"""Used by all other folders and depending on none of them: user errors, atomic files, process groups."""
