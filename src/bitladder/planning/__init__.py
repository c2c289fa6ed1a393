"""Plans schemes from a measurement: `plan(measurement, spec) -> Scheme`. Pure and exact; no torch, no model.

options     what every group may become, without what no plan can need
relaxation  bounds on what groups can do together
points      Pareto-optimal sums, which grow group by group
trade_off   the whole trade-off (the frontier), and what can be asked of it
solver      single budgets, without the whole
pricing     what an assignment costs and is predicted to do
patterns    what patterns name
ranges      refusals that name the attainable range
asking      every way to ask for a scheme
speed       how fast a scheme is served, from a profile of the device
sharing     whether the ranks that share a model can hold a scheme
shipped     profiles that come with Bitladder
remarks     what is said of a scheme beside its costs

numpy is imported with the module that computes, when one of its names is asked for.
"""

from typing import TYPE_CHECKING

from bitladder.lazily import given_by

if TYPE_CHECKING:
    from bitladder.planning.asking import fitted, kl_map_of, plan, plan_all, refuse_too_fast, related
    from bitladder.planning.patterns import Searched, matching_groups, named_groups
    from bitladder.planning.points import MAX_FRONTIER_CHOICES
    from bitladder.planning.pricing import density_order, price, standard_error
    from bitladder.planning.ranges import at_the_floor, floor_sentence, refuse_unattainable
    from bitladder.planning.remarks import remarked
    from bitladder.planning.solver import Solver, outline
    from bitladder.planning.trade_off import Frontier, TradeOff, frontier
else:
    __getattr__ = given_by(
        __name__,
        {
            "asking": ("fitted", "kl_map_of", "plan", "plan_all", "refuse_too_fast", "related"),
            "patterns": ("Searched", "matching_groups", "named_groups"),
            "points": ("MAX_FRONTIER_CHOICES",),
            "pricing": ("density_order", "price", "standard_error"),
            "ranges": ("at_the_floor", "floor_sentence", "refuse_unattainable"),
            "remarks": ("remarked",),
            "solver": ("Solver", "outline"),
            "trade_off": ("Frontier", "TradeOff", "frontier"),
        },
    )

__all__ = [
    "MAX_FRONTIER_CHOICES",
    "Frontier",
    "Searched",
    "Solver",
    "TradeOff",
    "at_the_floor",
    "density_order",
    "fitted",
    "floor_sentence",
    "frontier",
    "kl_map_of",
    "matching_groups",
    "named_groups",
    "outline",
    "plan",
    "plan_all",
    "price",
    "refuse_too_fast",
    "refuse_unattainable",
    "related",
    "remarked",
    "standard_error",
]
