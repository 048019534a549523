"""From a model to one dialect of graphs."""
