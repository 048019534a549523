"""Example inputs of small models, one kind a file. A function takes the model and what is asked of it."""
