"""How a cache says that a slot holds no token."""

EMPTY = 2.0**-9
"""The value of all entries of such a slot. Exact in every floating-point format down to eight bits, and no value of a
token: 0 would be, since a token of zeros has keys of zeros in a model without biases."""
