"""Small models to compile: a registry (`zoo`), the digits task and the recipe that trained its model."""
