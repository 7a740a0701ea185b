"""Allocation: how sparse each layer becomes where the model as a whole has a budget.

    uniform       ▆▆▆▆▆▆▆▆    every layer as sparse as the pattern says
    owl           ▃▅▆▆▆▇▇▆    blocks with more outliers keep more
    sensitivity   ▂▇▅▆█▆▇▃    the pruning that costs the least loss for each weight, wherever it is
    curves        ▂▇▅▆█▆▇▃    the same, by the error of each layer at several sparsities

These are the rules. `apportion` has their arithmetic, and the room `allocation` measures what that needs. An allocation of an
unstructured pattern prunes exactly the number of weights that the pattern would prune in one matrix of the budget's size; one
of an N:M pattern says which layers are pruned at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from statprune.methods.bounds import Between, Count, check

Spread = Annotated[float, Between(0, 1)]
BudgetSparsity = Annotated[float | None, Between(0, 1, without=(0, 1), or_none=True)]


@dataclass(frozen=True)
class Uniform:
    """Every layer as sparse as the pattern says."""


@dataclass(frozen=True)
class Owl:
    """Outlier-weighed layer-wise sparsity (Yin et al. 2024, ICML, arXiv 2310.05175): blocks with more outliers keep more.

    Deviations: weights count alike, where the authors' code has blocks count alike, so that the model's sparsity is exact;
    keep ratios stay within `spread` of the target, where the authors' span `2 spread` between the extreme blocks wherever
    the target is. Theirs and ours are linear in the share of outliers, with the target as their mean.
    """

    threshold: Annotated[float, Between(0.001, 1e6)] = 5.0
    """An entry of `|W| * ||X||` is an outlier above this many times the mean entry of its block."""

    spread: Spread = 0.08
    """How far a block's sparsity may be from the target."""

    sparsity: BudgetSparsity = None
    """Only with N:M patterns: the fraction of the weights in scope that is to be zero."""

    def __post_init__(self) -> None:
        check("owl", Owl, **vars(self))


@dataclass(frozen=True)
class Sensitivity:
    """Measured sensitivity under a global budget: prune where it costs the least loss for each weight.

    Minimises `sum_l dL_l e_l(s_l) / e_l(S)` over the layers' sparsities s_l. dL_l is the loss that pruning layer l alone at the
    target S makes, and e_l(s) the energy of its output error at the sparsity s.

    For a causal language model dL_l is the Kullback-Leibler divergence of its next-token distribution from the dense model's:
    the increase of the cross-entropy that is to be expected where the dense model is right. The increase on the probes' own
    next tokens estimates the same with far more noise, and was negative for a quarter of the layers of a trained model, where
    the divergence never is. For any other model it is the relative error energy of the output.

    Costs one pass of the dense model over the calibration batches, one forward pass over `probes` batches for each layer, and
    five prunings of each layer more: at the bounds, at the target, and once on either side of it.

    Several ranks lay the probes down in turns, one batch each, until there are enough: where the batches were dealt out in
    turns too, these are the ones that a single process measures on.
    """

    spread: Spread = 0.1
    """How far a layer's sparsity may be from the target. CVR+EC at 70 % on a trained LLaMA of 20 M parameters
    (perplexity 24.2 dense over all windows; one probe of 4 x 512 tokens, 30 windows of 512): 28.03 with the same sparsity
    everywhere, 27.00 with 0.1, 27.70 with 0.2. What is extrapolated further from the target is known less well."""

    probes: Annotated[int, Count(1, 10_000)] = 1
    """Calibration batches that the loss is measured on; on all ranks together."""

    sparsity: BudgetSparsity = None
    """Only with N:M patterns: the fraction of the weights in scope that is to be zero."""

    def __post_init__(self) -> None:
        check("sensitivity", Sensitivity, **vars(self))


@dataclass(frozen=True)
class Curves:
    """Error curves under a global budget: the sparsities, or N:M patterns, whose errors together cost the least loss.

    A layer's error at a sparsity is `sum_i g_i d_i H d_i^T` over its rows i: d_i is what a fast solver changes in the row, H
    the Gram of the layer's inputs in the dense model, and g_i the mean square of the loss's gradient with respect to output i,
    where the method has gradients. Where it has none, the g_i of a layer are one number, such that its error at the recipe's
    own sparsity is the divergence of the model's predictions with this layer alone pruned so far, as `Sensitivity` measures it.

    The errors come from a random sample of the rows and of the batches. The logarithm of a layer's error is taken to be linear
    between the sparsities where it was measured.

    With an N:M pattern each layer is dense or has the pattern, or with `mixed` a milder one (`NM.milder`).
    """

    spread: Spread = 0.2
    """How far a layer's sparsity may be from the target."""

    probes: Annotated[int, Count(1, 10_000)] = 1
    """Calibration batches of which one sequence each is what the divergence is measured on, where there are no gradients; on
    all ranks together. Of what is no language model, the whole batches."""

    sparsity: BudgetSparsity = None
    """Only with N:M patterns: the fraction of the weights in scope that is to be zero."""

    mixed: bool = False
    """Only with N:M patterns: whether a layer may have a milder one, such as 6:8 and 4:8 beside 2:4. Hardware that runs 2:4
    does not run all of them."""

    def __post_init__(self) -> None:
        check("curves", Curves, **vars(self))


AllocationRule = Uniform | Owl | Sensitivity | Curves

ALLOCATIONS: dict[str, Callable[..., AllocationRule]] = {
    "uniform": Uniform,
    "owl": Owl,
    "sensitivity": Sensitivity,
    "curves": Curves,
}
"""Allocations by the name a recipe uses."""
