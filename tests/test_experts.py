"""Stacks of matrices, each with tokens of its own: how experts are found, observed, pruned, saved and held."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import statprune
from statprune.commands.cli import main
from statprune.errors import CalibrationError, CheckpointError, SiteError
from statprune.experiments.runtime import first_block
from statprune.methods.experts import LEAST_TOKENS, ExpertMoments, by_matrix
from statprune.methods.pruner import PrunedWeight
from statprune.methods.statistics import InputMoments, Statistic
from statprune.model.inputs import bind_batches
from statprune.model.layers import find_layers
from statprune.record import RECORD, write_record
from statprune.training.masks import HeldMasks
from test_families import build, rows_of
from tiny_models import VOCABULARY, snapshot, tokens

STACKS = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]


def observed(model, batches, needs=Statistic.MOMENTS):
    """The statistics of each stack of the dense model, by name."""
    inputs = bind_batches(model, batches)
    layers = find_layers(model, inputs)
    found = layers.observe(layers.groups, inputs, schedule="one-shot", needs=needs)
    return {group.name: moments for group, moments in found if isinstance(moments, ExpertMoments)}


class TestStatistics:
    @given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 6), st.booleans())
    def test_each_matrix_has_the_sums_of_its_own_rows(self, counts, width, has_padding):
        rows = torch.randn(sum(counts), width)
        ends = torch.tensor(counts).cumsum(0).tolist()
        keep = torch.rand(len(rows)) < 0.5 if has_padding else None
        moments = ExpertMoments(len(counts), width, Statistic.GRAM).add(rows, ends, keep)
        for index, (end, count) in enumerate(zip(ends, counts, strict=True)):
            own = InputMoments.zeros(width, Statistic.GRAM)
            if count:
                own.add(rows[end - count : end], None if keep is None else keep[end - count : end])
            for one, other in zip(moments.parts[index].totals(), own.totals(), strict=True):
                assert torch.equal(one, other)
        for total, *parts in zip(moments.totals(), *(part.totals() for part in moments.parts), strict=True):
            assert torch.equal(total, torch.stack(parts))  # what ranks add up is what is read

    def test_a_matrix_that_saw_few_tokens_is_lent_average_ones(self):
        moments = ExpertMoments(3, 1, Statistic.GRAM).add(torch.tensor([[1.0], [3.0], [5.0], [7.0]]), [1, 1, 4])
        own, none, many = (moments.of(index, least=3) for index in range(3))
        # Of 4 tokens the average is 4, and the average square 21.
        assert (int(own.num_tokens), float(own.sum), float(own.sum_sq)) == (3, 1 + 2 * 4, 1 + 2 * 21)
        assert (int(none.num_tokens), float(none.sum), float(none.sum_sq)) == (3, 3 * 4, 3 * 21)
        assert own.gram.tolist() == [[1 + 2 * 21]]
        assert none.gram.tolist() == [[3 * 21]]
        assert many is moments.parts[2]
        assert moments.num_tokens.tolist() == [1, 0, 3]  # what came is not changed

    def test_a_row_of_zeros_is_a_token_that_went_to_another_matrix(self):
        inputs = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 3.0]], [[4.0, 4.0], [5.0, 5.0]]])
        moments = ExpertMoments(3, 2).add_batched(inputs, torch.tensor([1, 1]))
        assert moments.num_tokens.tolist() == [1, 1, 2]
        moments = ExpertMoments(3, 2).add_batched(inputs, torch.tensor([1, 0]))
        assert moments.num_tokens.tolist() == [1, 0, 1]
        assert moments.parts[2].sum.tolist() == [4.0, 4.0]

    @pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
    def test_experts_see_what_the_eager_model_gives_them(self, family, monkeypatch):
        model, _ = build(family)
        batches = [{"input_ids": tokens(3, 6)}, {"input_ids": tokens(1, 5)}]
        found = observed(model, batches, Statistic.GRAM)
        assert sorted(found) == sorted(STACKS)
        model.set_experts_implementation("eager")
        expected = {name: [InputMoments.zeros(moments.parts[0].sum.shape[-1], Statistic.GRAM) for _ in range(4)]
                    for name, moments in found.items()}  # fmt: skip
        starts = {model.get_parameter(name)[expert].data_ptr(): (name, expert) for name in STACKS for expert in range(4)}
        linear = F.linear

        def record(inputs, weight, bias=None):
            if weight.data_ptr() in starts:
                name, expert = starts[weight.data_ptr()]
                expected[name][expert].add(inputs)
            return linear(inputs, weight, bias)

        monkeypatch.setattr(F, "linear", record)
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for name, experts in expected.items():
            assert sum(int(one.num_tokens) for one in experts) == 2 * 23  # two experts for each token
            for own, reference in zip(found[name].parts, experts, strict=True):
                for one, other in zip(own.totals(), reference.totals(), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
    def test_padding_is_no_token(self, family):
        model, _ = build(family)
        short, long = tokens(1, 4), tokens(1, 6)
        padded = torch.cat([torch.cat([short, torch.zeros(1, 2, dtype=torch.long)], 1), long])
        mask = torch.ones_like(padded)
        mask[0, 4:] = 0
        alone = observed(model, [{"input_ids": short}, {"input_ids": long}])
        together = observed(model, [{"input_ids": padded, "attention_mask": mask}])
        assert len(alone) == 2
        for name, moments in alone.items():
            assert torch.equal(together[name].num_tokens, moments.num_tokens)
            torch.testing.assert_close(together[name].totals(), moments.totals(), rtol=1e-4, atol=1e-6)


class Stacked(nn.Module):
    """A product with a bare stack of matrices."""

    def __init__(self, multiply, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.multiply = multiply

    def forward(self, x):
        return self.multiply(x, self.w) * 2 + x.sum()


class TestFinding:
    @pytest.mark.parametrize(
        ("multiply", "shape", "layout"),
        [
            pytest.param(lambda x, w: torch.bmm(x, w), (3, 6, 4), "in_out", id="bmm"),
            pytest.param(lambda x, w: torch.bmm(x, w.mT), (3, 4, 6), "out_in", id="bmm of mT"),
            pytest.param(lambda x, w: torch.bmm(x, w.permute(0, 2, 1)), (3, 4, 6), "out_in", id="bmm of permute"),
            pytest.param(lambda x, w: x @ w, (3, 6, 4), "in_out", id="matmul"),
            pytest.param(lambda x, w: torch.baddbmm(x[..., :4], x, w), (3, 6, 4), "in_out", id="baddbmm"),
        ],
    )
    def test_a_batched_product_with_a_stack_is_a_site(self, multiply, shape, layout):
        model = Stacked(multiply, *shape)
        (group,) = find_layers(model, bind_batches(model, [torch.randn(3, 5, 6)])).groups
        assert [(site.name, site.layout, site.shape) for site in group.sites] == [("w", layout, (3, 4, 6))]
        assert group.sites[0].view(model.w).shape == (3, 4, 6)

    def test_padding_that_cannot_be_followed_is_refused(self):
        class Pairs(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.w = nn.Embedding(VOCABULARY, 8), nn.Parameter(torch.randn(3, 8, 4))

            def forward(self, input_ids, attention_mask):
                hidden = self.embed(input_ids).reshape(3, -1, 8)  # rows of three parts, in another order
                return torch.bmm(hidden, self.w).sum() * 2 + attention_mask.sum()

        mask = torch.ones(3, 4, dtype=torch.long)
        mask[0, 2:] = 0
        model, batch = Pairs(), {"input_ids": tokens(3, 4), "attention_mask": mask}
        with pytest.raises(CalibrationError, match=r"w: the calibration data has padding.*Give batches without"):
            statprune.prune(model, [batch], "cvr")


class TestPruning:
    def test_each_matrix_is_pruned_as_it_would_be_alone(self):
        weight, moments = torch.randn(3, 8, 8), ExpertMoments(3, 8)
        for part in moments.parts:
            part.add(torch.randn(LEAST_TOKENS, 8))
        pruner = statprune.Recipe("cvr+energy", "2:4").pruner()
        pruned = by_matrix(pruner, weight, moments)
        for index in range(3):
            alone = pruner(weight[index], moments.parts[index])
            assert torch.equal(pruned.weight[index], alone.weight)
            assert torch.equal(pruned.keep[index], alone.keep)

    def test_an_error_names_the_expert(self):
        def prune(weight, moments):
            if weight[0, 0] == 1:
                raise ValueError("no")
            return PrunedWeight(weight, weight != 0)

        with pytest.raises(ValueError, match="expert 1: no"):
            by_matrix(prune, torch.tensor([[[0.0]], [[1.0]]]), None)

    @pytest.mark.parametrize("method", ["wanda", "cvr+energy", "sparsegpt", "default", "magnitude"])
    @pytest.mark.parametrize("pattern", ["2:4", "4:8", "37%"])
    def test_every_expert_is_exactly_as_sparse_as_asked(self, mixture, method, pattern):
        model, layers, batches, dense = mixture
        model.load_state_dict(dense)
        recipe = statprune.Recipe(method, pattern)
        report = statprune.prune(model, batches, recipe, traced=layers)
        stacks = [site for site in report.sites if len(site.shape) == 3]
        assert [site.name for site in stacks] == STACKS
        for site in stacks:
            expected = recipe.build_pattern().pruned_of(*site.shape[1:])
            zeros = (rows_of(model, site) == 0).flatten(1).sum(1).tolist()
            assert zeros == [expected] * 4
            assert site.num_pruned == 4 * expected
            assert (site.tokens is None) == (method == "magnitude")

    def test_few_tokens_are_reported(self, mixture):
        model, layers, batches, dense = mixture
        model.load_state_dict(dense)
        report = statprune.prune(model, batches, "cvr+energy", traced=layers)
        first = next(site for site in report.sites if site.name == STACKS[0])
        assert sum(first.tokens) == 2 * report.num_tokens  # two experts for each
        assert "of 8 expert matrices 8 saw fewer than 64 calibration tokens, 0 saw none" in str(report)
        assert statprune.PruningReport.from_dict(json.loads(json.dumps(report.to_dict()))).sites == report.sites

    @pytest.mark.parametrize(
        ("recipe", "what"),
        [
            (statprune.Recipe("best", "2:4", allocation="uniform"), "the method .*gradients"),
            (statprune.Recipe("wanda", "50%", allocation="owl"), "the allocation owl"),
            (statprune.Recipe("wanda", "50%", allocation="sensitivity"), "the allocation sensitivity"),
        ],
    )
    def test_what_experts_cannot_have_is_refused_before_a_weight_changes(self, mixture, recipe, what):
        model, layers, batches, dense = mixture
        model.load_state_dict(dense)
        before = snapshot(model)
        with pytest.raises(
            SiteError, match=f"{STACKS[0]} is a stack of 4 matrices .experts., which cannot have {what}.*ignore"
        ):
            statprune.prune(model, batches, recipe, traced=layers)
        assert not [name for name, value in snapshot(model).items() if not torch.equal(value, before[name])]

    def test_a_search_leaves_out_what_experts_cannot_have(self, mixture):
        model, layers, _, dense = mixture
        model.load_state_dict(dense)
        own = [{"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)} for _ in range(2)]
        tuned = statprune.tune(model, own, pattern="2:4", minutes=0.02, traced=layers)
        tried = [trial.recipe.method for trial in tuned.trials]
        assert {"wanda", "sparsegpt"} <= set(tried)
        assert not [method for method in tried if "loss-aware" in method]

    def test_the_time_of_a_block_is_that_of_its_modules(self, mixture):
        model, layers, _, dense = mixture
        model.load_state_dict(dense)
        block = first_block(layers, statprune.Recipe("wanda", "2:4"))
        assert [site.name.rpartition(".")[2] for group in block for site in group.sites] == [
            "q_proj", "k_proj", "v_proj", "o_proj",
        ]  # fmt: skip

    def test_zeros_stay_through_training(self, mixture):
        model, layers, batches, dense = mixture
        model.load_state_dict(dense)
        report = statprune.prune(model, batches, "cvr+energy", traced=layers)
        masks = HeldMasks(model, report.sites)
        masks.mask_new_gradients()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
        optimizer.step()
        masks.mask_weights(optimizer)
        masks.check()
        for site in report.sites:
            if len(site.shape) == 3:
                assert ((rows_of(model, site) == 0).flatten(1).sum(1) == site.num_pruned // 4).all()


@pytest.fixture(scope="module")
def mixture():
    """A mixture, its layers, batches, and its dense weights to begin with again."""
    model, batches = build("mixtral")
    batches = [{name: value[:, :6] for name, value in batch.items()} for batch in batches]
    layers = find_layers(model, bind_batches(model, batches))
    return model, layers, batches, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture that transformers saves expert by expert, pruned."""
    model, batches = build("mixtral")
    report = statprune.prune(model, batches, "cvr+energy")
    return statprune.save(model, report, tmp_path_factory.mktemp("experts") / "pruned"), model


class TestSaving:
    def test_the_record_says_which_tensors_make_an_expert(self, folder):
        path, model = folder
        record = statprune.verify(path)
        site = next(site for site in record["sites"] if site["name"] == STACKS[0])
        assert [[tensor for _, tensor in parts] for parts in site["parts"]] == [
            [f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight" for part in ("w1", "w3")] for expert in range(4)
        ]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        ids = tokens(2, 5)
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_one_expert_that_grew_a_weight_is_found(self, folder, tmp_path):
        path, _ = folder
        broken = copied(path, tmp_path)
        tensors = load_file(broken / "model.safetensors")
        tensor = tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
        tensor[tensor == 0] = 1.0
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj: number of zeros promised"):
            statprune.verify(broken)

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            pytest.param(lambda site: site["parts"].pop(), "parts: expected those of 4 experts, found 3", id="an expert less"),
            pytest.param(lambda site: site["parts"][1].pop(), r"shape \[\.\.\., out, in\] promised", id="a part less"),
            pytest.param(lambda site: site["parts"][0].__setitem__(1, site["parts"][1][1]), "named twice", id="a part twice"),
            pytest.param(lambda site: site.update(tokens=[1, 2]), "tokens of each expert: expected 4", id="tokens"),
            pytest.param(lambda site: site.update(shape=[2, 2, 48, 16]), "4 dimensions", id="dimensions"),
            pytest.param(lambda site: site.update(num_pruned=site["num_pruned"] - 1), "number of pruned weights", id="count"),
        ],
    )
    def test_a_record_that_contradicts_itself_is_refused(self, folder, tmp_path, change, what):
        broken = copied(folder[0], tmp_path)
        record = json.loads((broken / RECORD).read_text())
        change(next(site for site in record["sites"] if site["name"] == STACKS[0]))
        write_record(broken, record)
        with pytest.raises(CheckpointError, match=what):
            statprune.verify(broken)

    def test_inspect_counts_its_zeros(self, folder, capsys):
        path, _ = folder
        assert main(["inspect", str(path), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        counted = {one["name"]: one for one in shown["layers"]}
        for name in STACKS:
            assert counted[name]["sparsity"] == 0.5
            assert counted[name]["pattern"] == "2:4"

    @pytest.mark.parametrize("family", ["gpt_oss", *(pytest.param(one, marks=pytest.mark.slow) for one in (
        "llama4", "deepseek_v3", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe",
    ))])  # fmt: skip
    def test_a_family_is_saved_verified_and_loaded(self, family, tmp_path):
        model, batches = build(family)
        report = statprune.prune(model, batches, statprune.Recipe("default", "2:4"))
        assert sum(len(site.shape) == 3 for site in report.sites) == 2
        record = statprune.verify(statprune.save(model, report, tmp_path / "pruned"))
        assert record["sparsity"] == 0.5
        loaded = type(model).from_pretrained(tmp_path / "pruned").eval()
        ids = tokens(2, 5)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def copied(path, tmp_path):
    """A copy of a folder."""
    new = tmp_path / "copy"
    new.mkdir()
    for file in path.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    return new
