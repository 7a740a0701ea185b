"""Allocation: measure on the dense model what a recipe's allocation needs, before anything is pruned.

    dense         the model, seen from here: its layers' statistics and weights
    probes        the predictions with one layer pruned, beside the dense model's
    sensitivity   that and the errors of each layer, by the recipe's own method
    curves        the errors of a sample of each layer's rows, by a fast method
    allocate      a rule in, the patterns of the layers out

One pass over calibration batches. A group's statistics are dropped as soon as its layers are known, so it holds no more than
the walk does. The model is untouched. The arithmetic is in `methods/apportion.py`.
"""

from statprune.allocation.allocate import Allocation, allocate
from statprune.allocation.curves import Curvature

__all__ = ["Allocation", "Curvature", "allocate"]
