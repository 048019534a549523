"""Small models to compile: a registry (`zoo`), and the tasks and recipes of those that are trained."""
