"""What it would take to keep few values at a cut and compute the others again: told in the plan, and not done.

    ──┤ narrow ── q k v ──── attention ┤ o ──┤ narrow ── gate up ──── product ┤ down ──
               └─ again ───────────────┘              └─ again ───────────────┘

On a CPU that is not worth it: the products with gate and up of LLaMA-2-7B for 2048 tokens took 36 times as long as writing and
reading what they would save (float32, one thread). On a GPU, where it may be, schedule `block` keeps the narrow cuts alone.
"""


class Recomputing:
    """Multiplications of one batch with weights, in all, and those between where little waits and the cuts where more does."""

    def __init__(self) -> None:
        self.done, self.again = 0, 0
        self._block: str | None = None
        self._points: list[tuple[int, int]] = []
        """(bytes that would wait, multiplications by then), in this block."""

    def enter(self, block: str) -> None:
        """What runs next is up to a cut of this block."""
        if block != self._block:
            self._block = block
            self._points.clear()

    def step(self, waiting: int, multiplications: int) -> None:
        """A step was taken, behind which so many bytes would wait."""
        self.done += multiplications
        if waiting:  # else nothing has run yet
            self._points.append((waiting, self.done))

    def cut(self, waiting: int) -> None:
        """So many bytes wait here."""
        narrowest = min((size for size, _ in self._points), default=waiting)
        if waiting > narrowest:
            self.again += self.done - max(done for size, done in self._points if size == narrowest)
