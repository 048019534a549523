"""HiPrune on the models of the fleet."""

import naive

from rulecases import RuleCase

CASE = RuleCase(
    # With every token of the class token's sequence as a feature there is no patch grid, which HiPrune needs.
    models=("llava", "llava-siglip-qwen2"),
    options=lambda model, keep: {"keep": keep, "alpha": 0.7},
    run=lambda model, inputs, keep: naive.run(model, inputs, patches=naive.hiprune(keep, alpha=0.7)),
)
