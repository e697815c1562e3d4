"""Tools: the check on a GPU, its measurements, the search for tiles."""
