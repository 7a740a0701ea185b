"""Statistics of a stack of matrices, each with tokens of its own: the experts of a mixture.

    rows of the grouped product     e0 e0 e0 | e2 e2 e2 e2 | e3          sorted by expert
    ends                            3 3 7 8                              expert 1 has seen nothing

Each expert's sums are those of the tokens that were routed to it. One that saw few of them is pruned by sums that are filled
up with average tokens of its layer, and one that saw none by those alone.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from statprune.methods.pruner import PrunedWeight, output_energies
from statprune.methods.statistics import SAMPLE_SIZE, InputMoments, InputSample, Statistic

LEAST_TOKENS = 64
"""Tokens that an expert's statistics stand for at least, with those that its layer lends it."""


class ExpertMoments:
    """The statistics of each matrix of a stack.

    Args:
        num: matrices in the stack.
        in_features: channels of the inputs.
        needs: what to collect of each; `Statistic.CROSS` counts as the Gram: tokens of the dense model may be routed elsewhere.
        device: of the inputs.
    """

    def __init__(
        self, num: int, in_features: int, needs: Statistic = Statistic.MOMENTS, *, device: torch.device | str = "cpu"
    ) -> None:
        # Sums of all lie in one tensor, so that ranks add them up at once; each expert has its part of it.
        self._whole = InputMoments.zeros(in_features, needs & ~Statistic.SAMPLE, stack=(num,), device=device)
        self.parts = [self._part(index, needs) for index in range(num)]
        """Of each matrix."""
        self._together: InputMoments | None = None
        """What experts with few tokens are lent; the sums are complete when the first of them asks."""

    def add(self, inputs: Tensor, ends: Sequence[int], keep_token: Tensor | None = None) -> "ExpertMoments":
        """Add tokens in place and return self.

        Args:
            inputs: [rows, in], the rows of matrix after matrix, any float dtype.
            ends: the row behind each matrix's last one.
            keep_token: [rows], bool; False is padding.
        """
        first = 0
        for part, end in zip(self.parts, ends, strict=True):
            if end > first:
                part.add(inputs[first:end], None if keep_token is None else keep_token[first:end])
            first = end
        return self

    def add_batched(self, inputs: Tensor, keep_token: Tensor | None = None) -> "ExpertMoments":
        """Add as many rows for each matrix, in place, and return self.

        Args:
            inputs: [num, rows, in]; a row of zeros is no token of that matrix, but one that went to others.
            keep_token: [rows], bool; False is padding.
        """
        keep_ER = (inputs != 0).any(dim=-1)
        if keep_token is not None:
            keep_ER &= keep_token.to(keep_ER)
        for part, rows, keep in zip(self.parts, inputs, keep_ER, strict=True):
            part.add(rows, keep)
        return self

    def totals(self) -> list[Tensor]:
        """The tensors that add up over ranks."""
        for part in self.parts:
            part.totals()  # completes its part of the Grams
        return self._whole.totals()

    def is_finite(self) -> bool:
        """Whether every input that was added was finite."""
        return all(part.is_finite() for part in self.parts)

    @property
    def num_tokens(self) -> Tensor:
        """[num], int64: tokens of each matrix."""
        return self._whole.num_tokens

    def of(self, index: int, least: int = LEAST_TOKENS) -> InputMoments:
        """What one matrix is pruned by: its own statistics, filled up to so many tokens with average ones of its layer.

        Args:
            index: of the matrix.
            least: tokens that the statistics stand for at least.
        """
        own, tokens = self.parts[index], int(self.num_tokens[index])
        if tokens >= least:
            return own
        together = self._together = self._together or self._summed()
        if not int(together.num_tokens):
            return own
        share = (least - tokens) / int(together.num_tokens)
        filled = copy.copy(own)
        filled._derived = {}
        filled.num_tokens = torch.full_like(own.num_tokens, least)
        filled.sum = own.sum + share * together.sum
        filled.sum_sq = own.sum_sq + share * together.sum_sq
        if own.gram is not None:
            assert together.gram is not None, "what each has, all have"
            filled.gram = own.gram + share * together.gram
        return filled

    def _summed(self) -> InputMoments:
        """The statistics of all matrices together: those of the layer."""
        num_tokens, sums, squares, *grams = (total.sum(dim=0) for total in self.totals())
        return InputMoments(num_tokens, sums, squares, grams[0] if grams else None)

    def _part(self, index: int, needs: Statistic) -> InputMoments:
        whole = self._whole
        gram = None if whole.gram is None else whole.gram[index]
        # All samples together are one that is a few times larger than that of a layer with one matrix.
        size = max(SAMPLE_SIZE // 8, 4 * SAMPLE_SIZE // len(whole.num_tokens))
        sample = InputSample(min(size, SAMPLE_SIZE)) if Statistic.SAMPLE in needs else None
        return InputMoments(whole.num_tokens[index], whole.sum[index], whole.sum_sq[index], gram, sample=sample)


def by_matrix(
    prune: Callable[[Tensor, InputMoments | None], PrunedWeight], weight: Tensor, moments: InputMoments | ExpertMoments | None
) -> PrunedWeight:
    """Prune a weight, or one matrix of a stack after the other: so that each has the pattern, and temporaries stay small.

    Args:
        prune: what prunes [out, in].
        weight: [out, in] or [experts, out, in].
        moments: of its inputs.

    Raises:
        ValueError: as `prune`; of a stack, it names the expert.
    """
    if weight.ndim == 2:
        assert not isinstance(moments, ExpertMoments), "a matrix has one set of tokens"
        return prune(weight, moments)
    pruned = PrunedWeight(torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool))
    for index, matrix in enumerate(weight):
        own = moments.of(index) if isinstance(moments, ExpertMoments) else moments
        try:
            one = prune(matrix, own)
        except ValueError as e:
            raise ValueError(f"expert {index}: {e}") from e
        pruned.weight[index], pruned.keep[index] = one.weight, one.keep
    return pruned


def sample_energies(weight: Tensor, pruned: Tensor, moments: InputMoments | ExpertMoments) -> Tensor | None:
    """What pruning changes in the output, and the dense output, over the sampled tokens of all matrices (`output_energies`).

    Returns:
        [2], float64; None where no token was kept.
    """
    parts = moments.parts if isinstance(moments, ExpertMoments) else [moments]
    matrices = zip(weight.view(-1, *weight.shape[-2:]), pruned.view(-1, *pruned.shape[-2:]), parts, strict=True)
    energies = [
        output_energies(dense, sparse, part.sample.rows)
        for dense, sparse, part in matrices
        if part.sample is not None and part.sample.rows is not None
    ]
    return torch.stack(energies).sum(dim=0) if energies else None
