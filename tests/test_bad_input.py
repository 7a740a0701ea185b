"""What cannot work is refused with the name of the thing and the way out, and leaves every bit of the model as it was."""

import pytest
import torch
from torch import nn

import statprune
from statprune.errors import CalibrationError, NonFiniteError, SiteError, StatpruneError
from statprune.model.kinds import vocabulary_and_context
from tiny_models import VOCABULARY, classifier, gpt2, llama, refused, tokens


def small_llama():
    return llama(num_hidden_layers=1)


class TestBatches:
    """Refused before the model is traced."""

    def test_no_batches(self):
        model = classifier()
        with refused(model, CalibrationError, "There are no calibration batches: expected at least one"):
            statprune.prune(model, [])

    def test_a_generator_that_was_used_up(self):
        model = classifier()
        generator = (torch.randn(2, 8) for _ in range(2))
        statprune.plan(model, generator)
        with refused(model, CalibrationError, "A generator that was already used up has none either"):
            statprune.prune(model, generator)

    @pytest.mark.parametrize("batches", [torch.arange(8), {"input": torch.randn(2, 8)}, "text", None, 3])
    def test_one_batch_in_place_of_several(self, batches):
        model = classifier()
        match = rf"batches are a {type(batches).__name__}.*: expected several.*Wrap a single batch in a list"
        with refused(model, CalibrationError, match):
            statprune.prune(model, batches)

    @pytest.mark.parametrize("batch", ["some text", 3, None, {1, 2}])
    def test_a_batch_of_an_unknown_kind(self, batch):
        model = classifier()
        match = rf"batch 1 is a {type(batch).__name__}: expected a tensor of tokens, a dict of tensors, rows of"
        with refused(model, CalibrationError, match):
            statprune.prune(model, [torch.randn(2, 8), batch])

    def test_a_batch_without_a_tensor(self):
        model = small_llama()
        with refused(model, CalibrationError, r"batch 0 has no tensor in it: .*'input_ids'.*Convert lists and arrays"):
            statprune.prune(model, [{"input_ids": "some text"}])

    def test_inputs_that_forward_does_not_take(self):
        model = classifier()
        with refused(model, CalibrationError, r"batch 0 does not fit Sequential\.forward: .*'tokens'"):
            statprune.prune(model, [{"tokens": torch.randn(2, 8)}])

    def test_inputs_that_differ_between_batches(self):
        model, ids = small_llama(), tokens(2, 5)
        with refused(
            model, CalibrationError, r"batch 1 has the inputs .*attention_mask.*expected the same inputs in every batch"
        ):
            statprune.prune(model, [{"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}])

    def test_a_constant_that_differs_between_batches(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = classifier()

            def forward(self, x, scale):
                return self.body(x * scale)

        model, x = Scaled(), torch.randn(2, 8)
        statprune.plan(model, [(x, 2.0), (x, 2.0)])
        with refused(
            model, CalibrationError, r"batch 1 has the inputs .*3\.0.*with the same value where an input is not a tensor"
        ):
            statprune.prune(model, [(x, 2.0), (x, 3.0)])

    def test_dimensions_that_differ_between_batches(self):
        model = classifier()
        with refused(model, CalibrationError, "has 2 dimensions in the first batch and others later"):
            statprune.prune(model, [torch.randn(2, 8), torch.randn(2, 3, 8)])

    def test_an_empty_tensor(self):
        model = classifier()
        with refused(model, CalibrationError, r"batch 1: the input 'input' of shape \(0, 8\) is empty"):
            statprune.prune(model, [torch.randn(2, 8), torch.randn(0, 8)])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_infinity_in_an_input(self, bad):
        model, x = classifier(), torch.randn(2, 8)
        x[1, 3] = bad
        with refused(model, NonFiniteError, r"batch 1: NaN or infinity in the input 'input'\. Nothing was changed"):
            statprune.prune(model, [torch.randn(2, 8), x])

    def test_nothing_but_padding(self):
        model, ids = small_llama(), tokens(2, 5)
        with refused(model, CalibrationError, r"all padding: 'attention_mask' is 0 everywhere, and 1 marks a token"):
            statprune.prune(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])

    def test_sequences_longer_than_the_context(self):
        model = small_llama()
        with refused(
            model, CalibrationError, r"batch 1: sequences of 33 tokens in 'input_ids', longer than .*context of 32\. Cut"
        ):
            statprune.prune(model, [tokens(1, 32), tokens(1, 33)])

    @pytest.mark.parametrize("bad", [VOCABULARY, -1])
    def test_token_ids_outside_the_vocabulary(self, bad):
        model, ids = small_llama(), tokens(2, 5)
        ids[1, 2] = bad
        match = (
            rf"batch 1: token ids from .* in 'input_ids', but the model's vocabulary has {VOCABULARY}\. .*another model's tok"
        )
        with refused(model, CalibrationError, match):
            statprune.prune(model, [tokens(2, 5), ids])

    def test_token_ids_outside_the_vocabulary_of_a_model_inside_a_wrapper(self):
        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = small_llama()

            def forward(self, input_ids):
                return self.inner(input_ids=input_ids).logits

        model = Wrapper()
        with refused(model, CalibrationError, "vocabulary has 48"):
            statprune.prune(model, [torch.full((2, 5), VOCABULARY)])

    def test_of_a_model_with_two_vocabularies_neither_is_taken_for_the_other(self, monkeypatch):
        model = small_llama()

        def get_text_config(self, **_):
            raise ValueError("Multiple valid text configs were found in the model config: ['text_encoder', 'decoder'].")

        monkeypatch.setattr(type(model.config), "get_text_config", get_text_config)
        assert vocabulary_and_context(model) == (None, None)

    def test_an_index_beyond_a_table_of_a_model_without_a_config(self):
        model = nn.Sequential(nn.Embedding(10, 8), classifier())
        match = r"Calibration batch 1: index out of range.*\(at 0\)\. Are there token ids beyond the vocabulary, .* Nothing was"
        with refused(model, CalibrationError, match):
            statprune.prune(model, [torch.tensor([[1, 2]]), torch.tensor([[3, 10]])])

    def test_a_position_beyond_a_table_that_the_config_does_not_tell_of(self):
        model = gpt2(n_layer=1)
        model.config.n_positions = 1000
        with refused(model, CalibrationError, r"batch 0: .*\(at transformer\.wpe\).*longer than the model's context\?"):
            statprune.prune(model, [tokens(1, 40)])


class TestWeights:
    """Refused before the model is traced."""

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["2.weight", "4.bias"])
    def test_nan_and_infinity_in_a_parameter(self, name, bad):
        model = classifier()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[1] = bad
        with refused(model, NonFiniteError, rf"NaN or infinity in the parameter {name}\..*saved whole\? Nothing was changed"):
            statprune.prune(model, [torch.randn(2, 8)])

    def test_weights_on_the_meta_device(self):
        with torch.device("meta"):
            model = classifier()
        with pytest.raises(SiteError, match=r"parameter 0\.weight is on the meta device and has no values\. Load the weights"):
            statprune.prune(model, [torch.randn(2, 8)])

    def test_weights_made_in_inference_mode(self):
        with torch.inference_mode():
            model = classifier()
        with pytest.raises(SiteError, match=r"0\.weight was made in torch\.inference_mode.*Build or load the model outside"):
            statprune.prune(model, [torch.randn(2, 8)])


class TestActivations:
    def overflowing(self):
        model = classifier()
        with torch.no_grad():
            model[0].weight.fill_(1e37)  # with inputs of 20, scores are in the range of float32, and sums of 4 are not
        return model

    @pytest.mark.parametrize("schedule", ["walk", "one-shot"])
    def test_infinity_names_the_first_layer_that_gets_it(self, schedule):
        model = self.overflowing()
        match = (
            r"NaN or infinity in the input of 2, the first layer where it shows.*try bfloat16 or float32\. Nothing was changed"
        )
        with refused(model, NonFiniteError, match):
            statprune.prune(model, [torch.full((2, 8), 100.0)], statprune.Recipe(schedule=schedule))

    def test_a_one_shot_run_sees_infinity_in_any_batch_before_a_weight_changes(self):
        model = self.overflowing()
        with refused(model, NonFiniteError, r"input of 2, .*Nothing was changed"):
            statprune.prune(model, [torch.zeros(2, 8), torch.full((2, 8), 100.0)], statprune.Recipe(schedule="one-shot"))

    def test_a_plan_changes_nothing_wherever_infinity_shows(self):
        model = self.overflowing()
        with refused(model, NonFiniteError, r"input of 2, .*Nothing was changed"):
            statprune.plan(model, [torch.zeros(2, 8), torch.full((2, 8), 20.0)], "wanda")

    def test_a_walk_that_meets_infinity_only_in_a_later_batch_says_what_is_pruned_already(self):
        model = self.overflowing()
        with pytest.raises(NonFiniteError, match=r"input of 2, .* Pruned already: 1 weight before it. Reload the model"):
            statprune.prune(model, [torch.zeros(2, 8), torch.full((2, 8), 20.0)], "wanda")

    def test_nan_in_padding_is_no_matter(self):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = classifier()

            def forward(self, x, attention_mask):
                return self.body(x / attention_mask[..., None])  # 0 / 0 in the padding

        x, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 1, 1]])
        report = statprune.prune(Masked(), [{"x": x * mask[..., None], "attention_mask": mask}])
        assert report.num_tokens == 5


class TestNames:
    def test_a_target_that_matches_nothing_suggests_the_nearest(self):
        model = small_llama()
        match = (
            r"targets=\['model\.layers\.0\.mlp\.up_prj'\]\) matches no weight.*Did you mean 'model\.layers\.0\.mlp\.up_proj'\?"
        )
        with refused(model, SiteError, match):
            statprune.prune(model, [tokens(1, 5)], statprune.Recipe(targets=["*.q_proj", "model.layers.0.mlp.up_prj"]))

    def test_an_ignore_that_matches_nothing(self):
        model = classifier()
        with refused(model, SiteError, r"ignore=\['9'\]\) matches no weight of this model.*statprune inspect"):
            statprune.prune(model, [torch.randn(2, 8)], statprune.Recipe(ignore=["9"]))

    def test_names_match_whole_and_not_in_part(self):
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(11)], nn.LayerNorm(8))
        report = statprune.plan(model, [torch.randn(2, 8)], statprune.Recipe(targets=["1"])).report
        assert [site.name for site in report.sites] == ["1"]

    def test_a_target_that_cannot_be_pruned_says_why(self):
        model = small_llama()
        with refused(model, SiteError, r"model\.embed_tokens cannot be pruned: embedding"):
            statprune.prune(model, [tokens(1, 5)], statprune.Recipe(targets=["model.embed_tokens"]))

    def test_what_cannot_be_pruned_may_be_ignored_by_name(self):
        recipe = statprune.Recipe(ignore=["*embed_tokens", "lm_head.weight"])
        report = statprune.plan(small_llama(), [tokens(1, 5)], recipe).report
        assert {one.name: one.reason for one in report.left_out} == {
            "model.embed_tokens": "embedding",
            "lm_head": "ignored by the recipe",
        }

    def test_the_name_of_a_tied_embedding_ignores_the_weight_and_does_not_target_it(self):
        model, batches = gpt2(n_layer=1), [tokens(1, 5)]
        ignored = statprune.plan(model, batches, statprune.Recipe(ignore=["transformer.wte"])).report
        assert ("lm_head", "ignored by the recipe") in [(one.name, one.reason) for one in ignored.left_out]
        with refused(
            model, SiteError, r"this is lm_head, feeds the output, tied to transformer\.wte\.weight\. Name it by that"
        ):
            statprune.prune(model, batches, statprune.Recipe(targets=["transformer.wte"]))
        within = statprune.plan(model, batches, statprune.Recipe(targets=["transformer.*"])).report
        assert "lm_head" not in [site.name for site in within.sites]

    def test_nothing_left_to_prune(self):
        model = nn.Linear(8, 2)
        match = r"Nothing in this model is left to prune \(weight: feeds the output\)\. Name layers in `targets`"
        with refused(model, SiteError, match):
            statprune.prune(model, [torch.randn(2, 8)])


class TestWidths:
    def model(self):
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def test_a_width_that_the_pattern_does_not_divide_names_layer_and_width(self):
        model = self.model()
        match = (
            r"^2: 2:4 does not divide its width of 6\. Leave such layers dense with on_indivisible: skip, .*Nothing was changed"
        )
        with refused(model, SiteError, match):
            statprune.prune(model, [torch.randn(2, 8)], statprune.Recipe(pattern="2:4"))

    def test_skip_leaves_the_layer_dense_and_reports_it(self):
        model = self.model()
        dense = model[2].weight.detach().clone()
        report = statprune.prune(model, [torch.randn(2, 8)], statprune.Recipe(pattern="2:4", on_indivisible="skip"))
        assert torch.equal(model[2].weight, dense)
        assert [site.name for site in report.sites] == ["0"]
        assert ("2", "2:4 does not divide its width of 6") in [(one.name, one.reason) for one in report.left_out]

    def test_a_layer_that_is_left_out_anyway_may_have_any_width(self):
        report = statprune.prune(self.model(), [torch.randn(2, 8)], statprune.Recipe(pattern="2:4", ignore=["2"]))
        assert [site.name for site in report.sites] == ["0"]


class TestDegenerate:
    """Not errors: finite results with exactly the zeros that were asked for."""

    @pytest.mark.parametrize("method", ["magnitude+energy", "wanda", "cvr+energy"])
    @pytest.mark.parametrize(
        "spoil",
        [
            pytest.param(lambda w, x: w[:, 2].zero_(), id="a zero column"),
            pytest.param(lambda w, x: w[:, 2].fill_(0.3), id="a constant column"),
            pytest.param(lambda w, x: w[1].zero_(), id="a zero row"),
            pytest.param(lambda w, x: w.zero_(), id="all zero"),
            pytest.param(lambda w, x: w.fill_(0.3), id="all equal"),
            pytest.param(lambda w, x: x[:, 2].zero_(), id="a dead channel"),
            pytest.param(lambda w, x: x[:, 2].fill_(5.0), id="a constant channel"),
            pytest.param(lambda w, x: x.zero_(), id="no signal"),
            pytest.param(lambda w, x: x[1:].copy_(x[0].expand_as(x[1:])), id="one token again and again"),
        ],
    )
    def test_constant_and_zero_channels(self, method, spoil):
        model, x = classifier(), torch.randn(6, 8)
        with torch.no_grad():
            spoil(model[0].weight, x)
        report = statprune.prune(model, [x], statprune.Recipe(method, pattern="2:4"))
        for site in report.sites:
            weight = model.get_parameter(site.parameter)
            assert torch.isfinite(weight).all()
            assert (weight.unflatten(-1, (-1, 4)).count_nonzero(-1) <= 2).all()
            assert site.num_pruned == weight.numel() // 2


def test_every_refusal_is_also_the_builtin_that_one_would_expect():
    with pytest.raises(ValueError, match="no calibration batches"):
        statprune.prune(classifier(), [])
    with pytest.raises(StatpruneError):
        statprune.prune(classifier(), [])
