"""DivPrune on the models of the fleet that have images."""

import fleet
import naive

from rulecases import RuleCase

CASE = RuleCase(
    models=fleet.VLMS,
    options=lambda model, keep: {"keep": keep},
    run=lambda model, inputs, keep: naive.run(model, inputs, [naive.divprune(keep)]),
)
