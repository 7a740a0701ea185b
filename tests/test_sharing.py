"""Ranks share the pruning, and get what each would have got by itself."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statprune
from statprune import sharing
from statprune.errors import RanksError, SiteError
from statprune.methods import triangles
from statprune.methods.compensations import COMPENSATIONS
from statprune.methods.criteria import CRITERIA
from statprune.methods.patterns import NM, Counted, Unstructured
from statprune.methods.rows import Alone, Rows, of_rows
from statprune.recipe import Recipe
from tiny_models import changed, llama, snapshot

quick = settings(max_examples=40, deadline=None, derandomize=True)


def test_pieces_go_to_the_rank_that_has_the_least_and_rows_in_equal_stretches():
    assert sharing.deal([576, 192, 192], 2) == [0, 1, 1]
    assert sharing.deal([1, 5, 2, 3], 2) == [0, 0, 1, 1]
    assert sharing.deal([7], 3) == [0]
    assert [sharing.stretch_of(rank, 3, 100) for rank in range(3)] == [(0, 32), (32, 64), (64, 100)]
    assert [sharing.stretch_of(rank, 3, 10) for rank in range(3)] == [(0, 3), (3, 6), (6, 10)]


@given(st.integers(1, 500), st.integers(1, 9))
def test_the_stretches_of_all_ranks_are_all_rows(count, size):
    stretches = [sharing.stretch_of(rank, size, count) for rank in range(size)]
    assert [row for first, end in stretches for row in range(first, end)] == list(range(count))


@quick
@given(st.data())
def test_a_stretch_of_rows_has_the_whole_matrixs_pattern(data):
    out, width = data.draw(st.integers(1, 9)), 4 * data.draw(st.integers(1, 5))
    count = data.draw(st.integers(0, out * (width - 1)))
    share, sparsity = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 0.99))
    pattern = data.draw(st.sampled_from([NM(2, 4), Unstructured(sparsity), Counted(count, width)]))
    first = data.draw(st.integers(0, out - 1))
    end = data.draw(st.integers(first + 1, out))
    cut = 4 * data.draw(st.integers(0, width // 4 - 1))
    score = torch.rand(out, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    part, some = of_rows(pattern, Rows(first, end, (out, width))), slice(first, end)
    keep = pattern(score)
    assert torch.equal(part(score[some]), keep[some])
    assert torch.equal(part.partly(score[some], share), pattern.partly(score, share)[some])
    assert torch.equal(part.slice(score[some, cut:], cut), pattern.slice(score[:, cut:], cut)[some])
    assert part.pruned_of(end - first, width) == int((~keep[some]).sum())
    assert part.fits(width)
    assert part.holds(keep[some].float())
    if int((~keep[some]).sum()):
        fewer = keep[some].clone()
        row, column = (~fewer).nonzero()[0]
        fewer[row, column] = True
        assert not part.holds(fewer.float())


def test_what_compares_rows_says_so():
    rows = Rows(0, 1, (2, 4))
    assert of_rows(Unstructured(0.5, "layer"), rows) is None
    assert of_rows(Counted(4, 4, "layer"), rows) is None
    alone = {name for name, known in CRITERIA.items() if of_rows(known, rows) is not None}
    assert alone == {"magnitude", "wanda", "optimal-brain"}
    for name in ("energy", "activation-energy"):
        assert of_rows(COMPENSATIONS[name], rows) is None
        assert of_rows(Recipe("wanda+" + name + ":column=false").pruner(), rows) is not None
        assert of_rows(Recipe("wanda+" + name + ":row=false").pruner(), rows) is None
    shared = {"default", "fast", "sparsegpt", "optimal-brain+least-squares"}
    for method in (*shared, "best", "paper", "cvr+least-squares", "ria+least-squares:steps=3", "wanda+loss-aware"):
        assert (of_rows(Recipe(method, "2:4").pruner(), rows) is not None) == (method in shared), method
    assert of_rows(Recipe("sparsegpt", "50%").pruner(), rows) is None  # the authors rank over the layer


class _Turned(Alone):
    """Computes pieces in another order, as a team does."""

    def __init__(self):
        self.pieces = []

    def gather(self, pieces):
        self.pieces.append(len(pieces))
        found = {index: pieces[index].compute() for index in reversed(range(len(pieces)))}
        for index, piece in enumerate(pieces):
            assert (found[index].shape, found[index].dtype) == (piece.shape, piece.dtype)
        return [found[index] for index in range(len(pieces))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1,), (5,), (40,), (2, 33)])
def test_factors_and_inverses_in_blocks_are_those_of_the_library(monkeypatch, dtype, size):
    monkeypatch.setattr(triangles, "NARROW", 8)
    monkeypatch.setattr(triangles, "LEAST", 5)
    monkeypatch.setattr(triangles, "LONG", 35)
    *stack, width = size
    tokens = torch.randn(*stack, 4 * width + 4, width, dtype=dtype)
    matrix, team = tokens.mT @ tokens, _Turned()
    lower = triangles.cholesky_(matrix.clone(), team)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(lower, torch.linalg.cholesky(matrix), **close)
    inverse = torch.linalg.inv(matrix)
    torch.testing.assert_close(triangles.inverse_of_matrix(lower, team), inverse, **close)
    torch.testing.assert_close(triangles.inverse_diagonal(lower, team), inverse.diagonal(dim1=-2, dim2=-1), **close)
    torch.testing.assert_close(triangles.inverse_of_factor(lower, team), torch.linalg.inv(lower).float(), rtol=1e-4, atol=1e-4)
    assert bool(team.pieces) == (width >= 5)
    for together, alone in zip(_all(matrix, team), _all(matrix, Alone()), strict=True):
        assert torch.equal(together, alone)


def _all(matrix, team):
    lower = triangles.cholesky_(matrix.clone(), team)
    return lower, *(one(lower, team) for one in (triangles.inverse_of_matrix, triangles.inverse_diagonal))


def test_a_matrix_that_has_no_factor_has_none(monkeypatch):
    monkeypatch.setattr(triangles, "NARROW", 2)
    matrix = torch.eye(5)
    matrix[3, 3] = -1
    assert triangles.cholesky_(matrix) is None
    matrix[3, 3] = math.nan
    assert triangles.cholesky_(matrix) is None


METHODS = {
    # method, pattern, target, schedule: how many of the 14 weights this rank prunes a part of
    "default": ("default", "2:4", "pruned", "walk", 14),
    "fast": ("fast", "50%", "dense", "walk", 14),
    "block": ("optimal-brain+least-squares", "4:8", "pruned", "block", 14),
    "sparsegpt": ("sparsegpt", "2:4", "pruned", "walk", 14),
    "layer": ("sparsegpt", "50%", "pruned", "walk", (8, 6)),  # q, o, gate, down | k and v, up
    "best": ("best", "2:4", "dense", "walk", (8, 6)),
    "curves": ("optimal-brain+least-squares", "50%", "pruned", "one-shot", 14),
    "paper": ("paper", "2:4", "pruned", "walk", 14),  # cheaper than to send: each rank prunes everything
}


def _pruned(rank, cases, is_shared):
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randint(3, 48, (2, 8), generator=generator) for _ in range(3)]
    found = {}
    for case in cases:
        method, pattern, target, schedule, _ = METHODS[case]
        recipe = Recipe(method, pattern, schedule, target=target, allocation="curves" if case == "curves" else "uniform")
        model, counted = llama(), []

        def counts(task, counted=counted, prune=sharing.Task.prune):
            counted.append(len(task.weight))
            return prune(task)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(triangles, "LEAST", 8)
            if not is_shared:
                monkeypatch.setattr(sharing, "place", lambda process_group: (0, 1))
            monkeypatch.setattr(sharing.Task, "prune", counts)
            report = statprune.prune(model, batches, recipe)
        found[case] = snapshot(model), report.sites, report.num_tokens, counted
    return found


def test_ranks_that_share_get_what_each_would_have_got_and_do_half_of_the_work(two_ranks):
    shared, alone = (two_ranks(_pruned, list(METHODS), is_shared) for is_shared in (True, False))
    for case, (*_, expected) in METHODS.items():
        (first, sites, tokens, rows), (second, same_sites, same_tokens, other_rows) = (ranks[case] for ranks in shared)
        one, sites_of_one, tokens_of_one, all_rows = alone[0][case]
        assert sites == same_sites, case
        assert tokens == same_tokens == tokens_of_one
        for name, weight in one.items():
            assert torch.equal(first[name], second[name]), (case, name)
            assert torch.equal(first[name] == 0, weight == 0), (case, name)
            # A product may round a row in another way when it has other rows beside it.
            torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)
        for site, of_one in zip(sites, sites_of_one, strict=True):
            assert (site.num_pruned, site.num_zeros) == (of_one.num_pruned, of_one.num_zeros)
            assert site.output_error == pytest.approx(of_one.output_error, rel=1e-3)
        assert (len(rows), len(other_rows)) == (expected if isinstance(expected, tuple) else (expected, expected)), case
        if case == "paper":
            assert rows == other_rows == all_rows
        else:
            assert sum(rows) + sum(other_rows) == sum(all_rows), case


def _fails_at(count):
    asked, prune = itertools.count(1), sharing.Task.prune

    def fails(task):
        if next(asked) == count:
            raise SiteError(f"{task.site.name}: no way to prune it")
        return prune(task)

    return fails


def _cannot_prune_its_share(rank):
    model = llama()
    before = snapshot(model)
    messages = []
    for method in ("default", "best"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sharing.Task, "prune", _fails_at(5 if rank else 0))
            with pytest.raises((SiteError, RanksError)) as caught:
                statprune.prune(model, [torch.randint(3, 48, (2, 8))], method)
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    return messages, changed(model, before)


def test_what_cannot_be_pruned_on_one_rank_ends_all(two_ranks):
    (first, different), (second, _) = two_ranks(_cannot_prune_its_share)
    for told, own in zip(first, second, strict=True):
        assert own.startswith("SiteError: model.layers."), own
        assert told.startswith("RanksError: statprune.prune: rank 1 failed: SiteError: model.layers."), told
        assert "no way to prune it" in told
    assert "Pruned already: " in first[0]
    assert different
