"""What a batch is: the same for `prune`, `plan`, `tune` and the callbacks, whoever made it."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

import statprune
from statprune.errors import CalibrationError
from statprune.model.batches import ROWS
from statprune.model.inputs import ModelInputs, bind_batches, read_inputs
from statprune.training.batches import draw
from tiny_models import classifier, gpt2, llama, refused, t5, tokens

ROW = [3, 4, 5, 6]
OTHER = [7, 8, 9, 10]


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=1)


def same(inputs, **expected):
    assert inputs.args == ()
    assert inputs.kwargs.keys() == expected.keys()
    return all(torch.equal(inputs.kwargs[name], torch.as_tensor(value)) for name, value in expected.items())


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.tensor([ROW, OTHER]), {"input_ids": [ROW, OTHER]}),
        (torch.tensor(ROW), {"input_ids": [ROW]}),
        (np.array([ROW, OTHER]), {"input_ids": [ROW, OTHER]}),
        ({"input_ids": torch.tensor([ROW])}, {"input_ids": [ROW]}),
        ({"input_ids": np.array([ROW])}, {"input_ids": [ROW]}),
        (BatchEncoding({"input_ids": [ROW], "attention_mask": [[0, 1, 1, 1]]}),
         {"input_ids": [ROW], "attention_mask": [[0, 1, 1, 1]]}),
        # what a DataLoader of pairs gives: a tuple, or a list of tensors; and what `datasets` gives
        ((torch.tensor([ROW]), torch.tensor([OTHER])), {"input_ids": [ROW]}),
        ([torch.tensor([ROW]), torch.tensor([OTHER])], {"input_ids": [ROW]}),
        ((torch.tensor([ROW]), torch.ones(1, 4, dtype=torch.int64)), {"input_ids": [ROW]}),
        ({"input_ids": ROW, "text": "to be", "label": 3, "idx": 7}, {"input_ids": [ROW]}),
        ({"input_ids": torch.tensor(ROW), "labels": torch.tensor(ROW)}, {"input_ids": [ROW]}),
        ({"input_ids": [ROW, OTHER], "text": ["to be", "or not"]}, {"input_ids": [ROW, OTHER]}),
        ([{"input_ids": ROW, "attention_mask": [1, 1, 1, 0], "text": "a"},
          {"input_ids": OTHER, "attention_mask": [1, 1, 1, 1], "text": "b"}],
         {"input_ids": [ROW, OTHER], "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]]}),
        (ROW, {"input_ids": [ROW]}),
        ([ROW, OTHER], {"input_ids": [ROW, OTHER]}),
    ],
)  # fmt: skip
def test_every_kind_of_batch_of_a_language_model(model, batch, expected):
    assert same(read_inputs(model, batch), **expected)
    again = read_inputs(model, read_inputs(model, batch))
    assert same(again, **expected)


def test_other_models_and_their_first_arguments():
    x, y = torch.randn(4, 8), torch.arange(4)
    assert torch.equal(read_inputs(classifier(), (x, y)).kwargs["input"], x)
    array = np.ones((2, 8))
    assert torch.equal(read_inputs(classifier(), array).kwargs["input"], torch.ones(2, 8))

    class Losing(nn.Module):
        def forward(self, x, scale, labels=None, **others): ...

    assert read_inputs(Losing(), (x, 2.0, y)).kwargs.keys() == {"x", "scale"}
    named = read_inputs(Losing(), {"x": x, "scale": 2.0, "labels": y, "bias": x, "text": ["a"]})
    assert named.kwargs.keys() == {"x", "scale", "bias"}
    assert read_inputs(torch.compile(Losing(), backend="eager"), (x, 2.0, y)).kwargs.keys() == {"x", "scale"}


def test_a_context_is_never_dropped_without_a_word_and_a_target_never_taken_for_one():
    class Reads(nn.Module):
        def forward(self, x, context=None, deep=False): ...

    x, y = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(CalibrationError, match=r"whether 'context' of Reads\.forward or a target comes after the first 1"):
        read_inputs(Reads(), (x, y))
    assert read_inputs(Reads(), (x,)).kwargs.keys() == {"x"}
    assert read_inputs(Reads(), {"x": x, "context": y}).kwargs.keys() == {"x", "context"}
    ids = torch.tensor([ROW])
    assert same(read_inputs(gpt2(), (ids, torch.tensor([OTHER]))), input_ids=[ROW])
    with pytest.raises(CalibrationError, match="or a target comes after the first 1"):
        read_inputs(gpt2(), (ids, torch.tensor([[0, 1, 1, 1]])))
    assert same(read_inputs(gpt2(), (ids, torch.tensor([0]))), input_ids=[ROW]), "a class"
    assert read_inputs(Reads(), (x, y), has_targets=True).kwargs.keys() == {"x"}, "out of a loader to train on"


def test_an_encoder_decoder_makes_its_decoder_inputs_of_labels_in_rows_too():
    model = t5()
    rows = [{"input_ids": ROW, "labels": [5, 6]}, {"input_ids": OTHER, "labels": [7, 8]}]
    together = read_inputs(model, rows)
    assert same(together, input_ids=[ROW, OTHER], decoder_input_ids=[[0, 5], [0, 7]])
    assert same(read_inputs(model, rows[0]), input_ids=[ROW], decoder_input_ids=[[0, 5]])
    assert same(read_inputs(model, {"input_ids": [ROW], "labels": [[5, 6]]}), input_ids=[ROW], decoder_input_ids=[[0, 5]])


def test_a_bare_tensor_of_windows_is_cut_and_prunes_as_a_list_of_batches_does():
    windows = tokens(ROWS + 3, 8)
    assert [len(inputs.kwargs["input_ids"]) for inputs in bind_batches(gpt2(), windows)] == [ROWS, 3]
    whole, cut, rows = (llama(num_hidden_layers=1) for _ in range(3))
    statprune.prune(whole, [windows], "paper")
    statprune.prune(cut, windows, "paper")
    statprune.prune(rows, [{"input_ids": row.tolist(), "source": "a book"} for row in windows], "paper")
    for name, weight in whole.named_parameters():
        for other in (cut, rows):
            assert torch.equal(other.get_parameter(name) == 0, weight == 0), name
            assert torch.allclose(other.get_parameter(name), weight, atol=1e-6), name


def test_plan_takes_the_pairs_of_a_loader_as_prune_does():
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 8), torch.arange(8)), batch_size=4)
    model = classifier()
    planned = statprune.plan(model, pairs, "wanda").weights
    statprune.prune(model, pairs, "wanda")
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in planned.items())


# Refused by name, before anything is changed.


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (
            [ROW, [3, 4]],
            r"batch 0: the rows of 'the rows' have different lengths, from 2 to 4\. Give each row as a batch of its",
        ),
        ([{"input_ids": ROW}, {"input_ids": [3, 4]}], r"the rows of 'input_ids' have different lengths, .* pad them"),
        ({"input_ids": [ROW, [3, 4]]}, r"the rows of 'input_ids' have different lengths"),
        ([{"input_ids": ROW, "attention_mask": ROW}, {"input_ids": ROW}], r"have 'attention_mask' in part only"),
        ({"input_ids": [ROW], "attention_masks": [ROW]}, r"it has 'attention_masks', .*Did you mean 'attention_mask'\?"),
        ({"text": ["to be"]}, r"it has 'text', and forward takes .*'input_ids'"),
        (
            (torch.tensor([ROW]), torch.tensor([[0, 1, 1, 1]])),
            r"tuple of 2, and whether 'attention_mask' of .* or a target .* Give a dict",
        ),
        ({"input_ids": [[3, 4, 2**70, 1]]}, r"no tensor can be made of 'input_ids'"),
        (torch.rand(2, 5), r"'input_ids' is of dtype torch\.float32, and token ids are whole numbers: .* \.long\(\)"),
        (torch.ones(2, 5, dtype=torch.bool), r"'input_ids' is of dtype torch\.bool"),
        (torch.ones(2, 5).to(torch.complex64), r"'input_ids' is of dtype torch\.complex64"),
        ({"input_ids": [ROW], "attention_mask": [[1, 1]]}, r"mask of shape \(1, 2\) does not belong to 'input_ids' of shape"),
    ],
)
def test_what_cannot_be_a_batch(model, batch, match):
    for call in (statprune.prune, statprune.plan, statprune.tune):
        with refused(model, CalibrationError, match):
            call(model, [batch])


def test_a_tensor_without_rows():
    with refused(classifier(), CalibrationError, "There are no calibration batches"):
        statprune.prune(classifier(), torch.zeros(0, 8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_a_dtype_that_the_model_does_not_compute_with(dtype):
    model = classifier()
    with refused(model, CalibrationError, r"batch 0: .*dtype.*Nothing was changed|batch 0: .*is of dtype torch\.float8"):
        statprune.prune(model, [torch.ones(2, 8).to(dtype)])


def test_what_is_inputs_already_is_taken_as_it_is():
    class Masked(nn.Module):
        def forward(self, x, mask=None): ...

    inputs = ModelInputs((torch.ones(1, 2), torch.tensor([[0, 1]])), {})
    assert read_inputs(Masked(), inputs).kwargs.keys() == {"x", "mask"}


def test_drawing_from_a_loader_leaves_its_own_random_numbers_alone():
    def order(is_drawn):
        dataset = torch.utils.data.TensorDataset(torch.arange(12))
        loader = torch.utils.data.DataLoader(dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
        first = torch.cat([batch for (batch,) in loader])
        drawn = draw(loader, 3) if is_drawn else []
        return len(drawn), [*first, *torch.cat([batch for (batch,) in loader])]

    assert order(True)[0] == 3
    assert order(True)[1] == order(False)[1]


@pytest.mark.parametrize(("rank", "limit", "expected"), [(0, 9, [0, 2, 4]), (1, 9, [1, 3]), (0, 3, [0, 2]), (1, 3, [1])])
def test_batches_are_dealt_out_in_turns_and_the_limit_is_of_all_ranks(rank, limit, expected):
    assert draw(range(5), limit, rank=rank, num_ranks=2) == expected
    assert len(draw(range(100), limit, rank=rank, num_ranks=2, is_dealt_out=True)) == {9: 5, 3: 2}[limit] - rank


def test_each_rank_needs_a_batch():
    for rank in (0, 1):
        with pytest.raises(CalibrationError, match="1 of the 2 batches that 2 ranks need at least"):
            draw([tokens(2, 4)], 8, rank=rank, num_ranks=2)
    with pytest.raises(CalibrationError, match="Rank 1 of 2 has no calibration batch"):
        draw([], 8, rank=1, num_ranks=2, is_dealt_out=True)
