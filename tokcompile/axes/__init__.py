"""Token-axis inference: atoms (unification), rules (one small function per ATen op), infer."""

from tokcompile.axes.atoms import Atom, Dim, product, resolve, size_of
from tokcompile.axes.infer import Axes, infer

__all__ = ["Atom", "Axes", "Dim", "infer", "product", "resolve", "size_of"]
