"""Models that torch.export cannot trace are pruned by module hooks, and say so."""

import pytest
import torch
from torch import nn

import statprune
from statprune.errors import CalibrationError, NonFiniteError, SiteError
from statprune.model.hooks import find_linear_modules
from statprune.model.inputs import bind_batches
from tiny_models import classifier, gpt2, llama, refused, t5, tokens

ONE_SHOT = statprune.Recipe(pattern="2:4", schedule="one-shot")


class Net(nn.Module):
    """With `branching`, control flow that depends on the data, which no graph can hold; it computes the same without."""

    def __init__(self, branching: bool, model: nn.Module | None = None):
        super().__init__()
        self.branching, self.model = branching, model or classifier()

    def forward(self, x, attention_mask=None):
        if self.branching and x.sum() > 1e9:
            return x
        return self.model(x) if attention_mask is None else self.model(x) * attention_mask[..., None]


def by_hooks(model, batches, recipe=ONE_SHOT, **settings):
    with pytest.warns(UserWarning, match="Falling back to module hooks"):
        return statprune.prune(model, batches, recipe, **settings)


def test_a_model_that_cannot_be_exported_is_pruned_by_hooks_with_a_warning_that_names_the_reason():
    model = Net(branching=True)
    match = r"^torch\.export cannot trace Net: GuardOnDataDependentSymNode: .* Falling back to module hooks with one-shot"
    with pytest.warns(UserWarning, match=match) as warned:
        report = statprune.prune(model, [torch.randn(4, 8)])
    assert warned[0].filename == __file__  # the line that called prune
    assert report.schedule == "one-shot (module hooks)"
    assert report.fallback_reason.startswith("torch.export cannot trace Net: GuardOnDataDependentSymNode")
    assert [site.name for site in report.sites] == ["model.0", "model.2"]
    assert [(one.name, one.reason) for one in report.left_out] == [("model.4", "feeds the output")]


def test_a_failed_trace_prints_nothing_of_its_own(capfd):
    by_hooks(Net(branching=True), [torch.randn(4, 8)])
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_hooks_prune_to_the_same_bits_as_the_one_shot_walk_over_a_graph():
    batches = [torch.randn(4, 8), torch.randn(1, 8)]
    traced, hooked = Net(branching=False), Net(branching=True)
    expected, report = statprune.prune(traced, batches, ONE_SHOT), by_hooks(hooked, batches)
    assert expected.schedule == "one-shot"
    for (name, one), (_, other) in zip(traced.named_parameters(), hooked.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert report.sites == expected.sites
    assert report.num_tokens == expected.num_tokens == 5


@pytest.mark.parametrize("flat", [False, True], ids=["[batch, length, channels]", "[batch * length, channels]"])
def test_padding_does_not_count_in_hooks_either(flat):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier()

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], -1) if flat else self.inner(x)

    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    padded, tight = Net(True, Flat()), Net(False, Flat())
    recipe = statprune.Recipe(schedule="one-shot", ignore=["*.4"])
    assert by_hooks(padded, [{"x": x, "attention_mask": mask}], recipe).num_tokens == 7
    statprune.prune(tight, [x[mask.bool()][None]], recipe)
    for (name, one), (_, other) in zip(padded.named_parameters(), tight.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_padding_of_an_encoder_decoder_is_refused_because_hooks_cannot_tell_whose_it_is():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = t5()

        def forward(self, input_ids, attention_mask, decoder_input_ids):
            if input_ids.sum() < 0:
                return None
            return self.model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids)

    model, ids = Branching(), tokens(2, 4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": tokens(2, 4)}
    assert by_hooks(model, [batch]).num_tokens == 8
    batch["attention_mask"][0, 2:] = 0
    with (
        pytest.warns(UserWarning, match="Falling back"),
        refused(model, CalibrationError, r"batch 0 has padding.*Give batches without padding\. Nothing was changed"),
    ):
        statprune.prune(model, [batch])


def found_in(model, batch):
    groups, left_out = find_linear_modules(model, bind_batches(model, [batch])[0])
    return [[site.name for site in group.sites] for group in groups], left_out, {s.name: s for g in groups for s in g.sites}


def test_neighbours_on_the_same_tensor_are_a_group_and_conv1d_is_a_linear():
    groups, left_out, sites = found_in(gpt2(n_layer=1), tokens(2, 5))
    assert groups[0] == ["transformer.h.0.attn.c_attn"]
    assert (sites["transformer.h.0.attn.c_attn"].layout, sites["transformer.h.0.attn.c_attn"].shape) == ("in_out", (48, 16))
    assert {one.name for one in left_out} == {"transformer.wpe"}
    assert {one.reason for one in left_out} == {"not the weight of a linear module that ran"}
    groups, _, _ = found_in(llama(num_hidden_layers=1), tokens(2, 5))
    assert [len(group) for group in groups] == [3, 1, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_layer_is_found_by_its_numbers(dtype):
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier().to(dtype)

        def forward(self, x):
            return {"logits": self.inner(x.to(dtype)).float()}

    _, _, sites = found_in(Casts(), torch.randn(4, 8))
    assert [name for name, site in sites.items() if site.feeds_output] == ["inner.4"]


def test_tied_and_shared_weights_say_so():
    _, _, sites = found_in(gpt2(n_layer=1), tokens(2, 5))
    assert sites["lm_head"].default_exclusion == "feeds the output, tied to transformer.wte.weight"
    body = nn.Linear(8, 8)
    _, _, sites = found_in(nn.Sequential(body, nn.ReLU(), body, nn.Linear(8, 2)), torch.randn(2, 8))
    assert sites["0"].default_exclusion == "tied to 2.weight"


def test_a_linear_that_is_the_model_and_one_that_is_called_by_keyword_are_found():
    class Keyword(nn.Linear):
        def forward(self, input):
            return super().forward(input) if input.sum() < 1e9 else input

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Keyword(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(input=self.body(input=x))

    assert [site.name for site in by_hooks(Calls(), [torch.randn(4, 8)]).sites] == ["body"]
    report = by_hooks(Keyword(8, 8), [torch.randn(4, 8)], statprune.Recipe(targets=["weight"]))
    assert [site.parameter for site in report.sites] == ["weight"]


def test_the_forward_context_is_around_the_model():
    class NeedsAutocast(Net):
        def forward(self, x):
            return super().forward(x.bfloat16())  # float32 weights, which is an error outside of autocast

    model = NeedsAutocast(branching=True)
    report = by_hooks(model, [torch.randn(4, 8)], forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert len(report.sites) == 2


def test_infinite_activations_are_refused_before_anything_is_pruned():
    model = Net(branching=True)
    batches = [torch.randn(4, 8), torch.randn(4, 8)]
    with torch.no_grad():
        model.model[0].weight.fill_(1e38)
        batches[0].zero_()  # the first batch is fine
        batches[1].abs_().mul_(100)
    with (
        pytest.warns(UserWarning, match="Falling back"),
        refused(model, NonFiniteError, r"input of model\.2, the first layer where it shows.*Nothing was changed"),
    ):
        statprune.prune(model, batches)


def test_names_are_checked_as_with_a_graph():
    model = Net(branching=True)
    with (
        pytest.warns(UserWarning, match="Falling back"),
        refused(model, SiteError, r"targets=\['model\.7'\].*matches no weight"),
    ):
        statprune.prune(model, [torch.randn(4, 8)], statprune.Recipe(targets=["model.7"]))


def test_a_graph_that_holds_for_some_lengths_only_is_not_used_for_others():
    class Chunks(nn.Module):
        """Works on chunks of 4 positions and pads to that, as Mamba2 does; a graph without padding is for multiples of 4."""

        def __init__(self):
            super().__init__()
            self.inner = classifier()

        def forward(self, x):
            if (missing := -x.shape[1] % 4) > 0:
                x = nn.functional.pad(x, (0, 0, 0, missing))
            return self.inner(x.unflatten(1, (-1, 4)).mean(2))

    model = Chunks()
    report = statprune.prune(model, [torch.randn(2, 8, 8), torch.randn(1, 12, 8)], ONE_SHOT)
    assert report.schedule == "one-shot"
    match = r"cannot trace Chunks for the shapes of calibration batch 1: AssertionError: Guard failed: .*x\.size.* Falling back"
    with pytest.warns(UserWarning, match=match):
        report = statprune.prune(model, [torch.randn(2, 12, 8), torch.randn(2, 6, 8)], ONE_SHOT)
    assert report.num_tokens == 2 * 3 + 2 * 2


def test_a_batch_that_the_model_cannot_run_is_the_error_and_not_a_fallback():
    model = Net(branching=False)
    with refused(model, CalibrationError, r"Net cannot run calibration batch 0: mat1 and mat2 shapes cannot be multiplied"):
        statprune.prune(model, [torch.randn(4, 7)])


@pytest.mark.real_export
def test_a_graph_with_inputs_that_no_batch_has_is_none():
    """As of Qwen2-VL, whose positions the exporter of transformers computes beforehand."""
    model = llama(num_hidden_layers=1)
    model.get_rope_index = lambda input_ids: (torch.arange(input_ids.shape[1]).expand(input_ids.shape), None)
    match = (
        r"cannot trace LlamaForCausalLM with the inputs that it has: .* makes input_ids, position_ids of input_ids\. Falling"
    )
    with pytest.warns(UserWarning, match=match):
        report = statprune.prune(model, [tokens(2, 6)], ONE_SHOT)
    assert len(report.sites) == 7
