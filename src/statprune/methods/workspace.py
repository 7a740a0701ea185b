"""What a method takes of memory to prune one weight, beside the weight and its statistics.

Measured and not derived: a process pruned one bfloat16 weight on one CPU thread, and Linux told the highest resident memory
since just before (`/proc/self/clear_refs`, `VmHWM`), for tall weights (many rows), square and wide ones, at 2:4 and at 50 %;
the table has the higher of the two. With the Gram a method may have two high points: where its inverse is made, which a wide
weight shows, and where the weights are chosen or solved for, which a tall one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from statprune.methods.statistics import Statistic


@dataclass(frozen=True)
class HighPoint:
    """Multiples of float32 matrices that are there at once."""

    weight: float
    """Of [out, in]."""
    gram: float = 0.0
    """Of [in, in]."""
    curvature: float = 0.0
    """Of [out, out]."""

    def bytes_for(self, out: int, width: int) -> int:
        """For one weight [out, width]."""
        return int(4 * (self.weight * out * width + self.gram * width**2 + self.curvature * out**2))


HIGH_POINTS: dict[str, tuple[HighPoint, ...]] = {
    "magnitude": (HighPoint(4.7),),
    "wanda": (HighPoint(4.3),),
    "ria": (HighPoint(5.0),),
    "z-pruner": (HighPoint(7.3),),
    "cvr": (HighPoint(4.3),),
    "optimal-brain": (HighPoint(0.6, 3.4), HighPoint(4.4, 1.0)),
    "sparsegpt": (HighPoint(1.0, 3.3), HighPoint(3.8, 1.1)),
    "none": (HighPoint(2.0),),
    "energy": (HighPoint(5.5),),
    "activation-energy": (HighPoint(6.3),),
    "least-squares": (HighPoint(8.3, 1.0),),
    "least-squares, in steps": (HighPoint(8.3, 2.2),),
    "loss-aware": (HighPoint(9.7, 1.5, 3.1),),
    "loss-aware, in steps": (HighPoint(9.7, 2.7, 4.0),),
}
"""Of criteria, pruners and compensations, by name; of those that reach the mask in steps, apart."""

_BUFFERS = 5 << 20
"""Bytes of what is made of one block of rows (`blockwise`)."""

TARGET = HighPoint(1.0, 2.0)
"""What a dense target adds to all that comes after it."""


def workspace(criterion: str, compensations: Sequence[str], out: int, width: int, needs: Statistic) -> int:
    """Bytes to prune one weight [out, width], the result included.

    Args:
        criterion: or a pruner, by name.
        compensations: by name, as `HIGH_POINTS` has them.
        out: rows.
        width: columns.
        needs: what the method and the target need.

    A method of another package counts as the greediest one that needs as much.
    """
    unknown = [name for name in (criterion, *compensations) if name not in HIGH_POINTS]
    names = [name for name in (criterion, *compensations) if name in HIGH_POINTS]
    if unknown:
        has_gram = bool((Statistic.GRAM | Statistic.CROSS | Statistic.CURVATURE) & needs)
        names += ["least-squares, in steps", "loss-aware, in steps"] if has_gram else ["z-pruner"]
    highest = max(point.bytes_for(out, width) for name in names for point in HIGH_POINTS[name])
    return highest + (TARGET.bytes_for(out, width) if Statistic.CROSS in needs else 0)


def workspace_by_blocks(out: int, width: int, itemsize: int) -> int:
    """Bytes for one weight [out, width] whose elements take so many, where it is pruned by blocks of rows: it and its mask."""
    return out * width * (itemsize + 1) + _BUFFERS
