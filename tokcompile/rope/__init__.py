"""Rotary tables: made of other angles, and what is wrong with them."""
