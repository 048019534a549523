"""The passes: one verb of a rule a file. Each takes the context of a rule's application and one step."""

from tokcompile.passes.context import Context, Scores, Selection
from tokcompile.passes.drop import drop
from tokcompile.passes.evict import evict
from tokcompile.passes.insert import insert
from tokcompile.passes.layer import layer
from tokcompile.passes.mark import mark
from tokcompile.passes.merge import merge
from tokcompile.passes.place import place
from tokcompile.passes.rotate import rotate
from tokcompile.passes.route import route
from tokcompile.passes.score import score
from tokcompile.passes.select import select
from tokcompile.passes.tap import tap

PASSES = {
    "tap": tap,
    "score": score,
    "select": select,
    "drop": drop,
    "merge": merge,
    "mark": mark,
    "insert": insert,
    "layer": layer,
    "place": place,
    "rotate": rotate,
    "evict": evict,
    "route": route,
}

__all__ = ["PASSES", "Context", "Scores", "Selection"]
