"""What is pruned stays exactly zero while training goes on: in any Trainer, with any optimizer, through resume and crash."""

import subprocess
import sys
import textwrap

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from statprune import CausalLM, Recipe, StatisticalPruning, ranks
from statprune.checkpoint import save, verify
from statprune.errors import CheckpointError, MaskError, NonFiniteError, RecipeError
from statprune.loading import load_model
from statprune.report import PruningReport, SiteReport
from statprune.training.masks import HeldMasks, remeasure
from test_callback import Classifier, classifier_data, layer_weights, loader, sparsity, tiny_llama, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]
RECIPE = Recipe("wanda", "2:4")


def finetuning(**settings):
    return StatisticalPruning(RECIPE, calibration=loader(), then="finetune", **settings)


def zeros(model):
    return {name: weight.detach() == 0 for name, weight in layer_weights(model).items()}


class Watch(Callback):
    """Stands before the pruning callback, as an averaging callback may, and looks at the weights after every batch."""

    def __init__(self):
        self.first, self.steps = None, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.first = self.first or zeros(pl_module)
        self.steps = trainer.global_step
        assert all(torch.equal(now, self.first[name]) for name, now in zeros(pl_module).items())


# The masks by themselves: one weight of six, of which two are pruned.


def held(layer, num_zeros=2):
    return HeldMasks(layer, [SiteReport("layer", "weight", (2, 3), "out_in", num_zeros, num_zeros, 1.0, 1.0)])


def layer_with_two_zeros():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0]]))
    return layer


def test_gradients_of_pruned_weights_become_zero_even_where_they_are_nan():
    layer = layer_with_two_zeros()
    masks = held(layer)
    masks.mask_gradients()  # without gradients there is nothing to do
    layer.weight.grad = torch.tensor([[torch.nan, 1.0, 2.0], [3.0, torch.inf, 4.0]])
    masks.mask_gradients()
    assert layer.weight.grad.tolist() == [[0, 1, 2], [3, 0, 4]]


def test_weights_and_state_are_masked_where_they_have_the_weights_shape_and_are_numbers():
    layer = layer_with_two_zeros()
    masks = held(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    state = {
        "moment": torch.ones(2, 3),
        "rows": torch.ones(2),
        "codes": torch.ones(2, 3, dtype=torch.uint8),
        "step": 7,
        "no": None,
    }
    optimizer.state[layer.weight] = dict(state)
    optimizer.state[layer.bias] = {"moment": torch.ones(2)}
    with torch.no_grad():
        layer.weight.fill_(5.0)
    masks.mask_weights(optimizer)
    masks.mask_optimizer_state(optimizer)
    assert layer.weight.tolist() == [[0, 5, 5], [5, 0, 5]]
    masked = optimizer.state[layer.weight]
    assert masked["moment"].tolist() == [[0, 1, 1], [1, 0, 1]]
    assert (masked["rows"] == 1).all()
    assert (masked["codes"] == 1).all()
    assert (optimizer.state[layer.bias]["moment"] == 1).all()


def test_an_optimizer_of_other_weights_masks_none_of_these():
    layer, other = layer_with_two_zeros(), nn.Linear(2, 2)
    masks = held(layer)
    with torch.no_grad():
        layer.weight.fill_(5.0)
    masks.mask_weights(torch.optim.SGD(other.parameters(), lr=0.1))
    assert (layer.weight == 5).all()
    with pytest.raises(MaskError, match="layer: 2 pruned weights are not zero after the training"):
        masks.check()


def test_weights_that_grew_back_or_do_not_exist_are_refused():
    with pytest.raises(MaskError, match=r"layer has 2 zeros, but 3 were recorded .* grew back"):
        held(layer_with_two_zeros(), num_zeros=3)
    with pytest.raises(MaskError, match="ReLU has no parameter weight"):
        held(nn.ReLU())


def test_a_report_survives_the_way_through_plain_data():
    report = PruningReport({"pattern": "2:4"}, "walk", [SiteReport("a", "a.weight", (2, 3), "out_in", 2, 2, 4.0, 3.0)])
    assert PruningReport.from_dict(report.to_dict()) == report


def test_then_is_one_of_two_words():
    with pytest.raises(RecipeError, match=r"then='retrain'\): expected 'stop' or 'finetune'"):
        StatisticalPruning(then="retrain")


# In a Trainer.


def test_fit_prunes_first_and_trains_what_is_left():
    torch.manual_seed(1)
    callback, watch, module = finetuning(), Watch(), CausalLM(tiny_llama(), learning_rate=1e-2)
    fit = trainer(watch, callback, max_epochs=2, num_sanity_val_steps=1)
    fit.fit(module, loader(shuffle=True), loader())
    assert watch.steps == 6
    assert sparsity(module) == 0.5
    assert all(torch.equal(now, watch.first[name]) for name, now in zeros(module).items())
    metrics = fit.callback_metrics
    assert metrics["pruned_perplexity"] == pytest.approx(metrics["val_perplexity"].item(), rel=1e-6)
    assert metrics["pruned_sparsity"] == 0.5
    assert metrics["pruned_energy_ratio"] == pytest.approx(callback.report.energy_ratio, rel=1e-6)
    assert "dense_perplexity" not in metrics
    assert callback.report.finetuning_steps == 6
    assert not fit.optimizers[0]._optimizer_step_post_hooks


def test_training_lowers_the_loss_of_the_sparse_model():
    module = CausalLM(tiny_llama(), learning_rate=1e-2)
    before = trainer(finetuning()).validate(module, loader(), verbose=False)[0]["val_loss"]
    fit = trainer(finetuning(), max_epochs=3)
    fit.fit(module, loader(), loader())
    assert fit.callback_metrics["val_loss"] < before


def muon_like(parameters):
    class Orthogonalized(torch.optim.Optimizer):
        """Steps along the nearest orthogonal matrix of a momentum: dense, whatever is zero in the gradient."""

        def __init__(self, parameters):
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure):
            with torch.enable_grad():
                loss = closure()
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is None or parameter.ndim < 2:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.9).add_(parameter.grad)
                left, _, right = torch.linalg.svd(momentum, full_matrices=False)
                parameter.sub_(0.01 * left @ right)
                momentum.copy_(left @ right)
            return loss

    return Orthogonalized(parameters)


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, max_iter=3),
    "orthogonalized": muon_like,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    class Mine(Classifier):
        def configure_optimizers(self):
            return OPTIMIZERS[name](self.parameters())

    module, watch = Mine(), Watch()
    callback = StatisticalPruning(Recipe(pattern="50%"), then="finetune")
    dense = {key: weight.detach().clone() for key, weight in module.named_parameters()}
    settings = {} if name == "lbfgs" else {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    trainer(watch, callback, max_epochs=2, **settings).fit(module, classifier_data(), classifier_data())
    weight = module.features[0].weight
    assert (weight == 0).float().mean() == 0.5
    assert (weight[weight != 0] != dense["features.0.weight"][weight != 0]).any()
    assert callback.report.finetuning_steps == (8 if name == "lbfgs" else 4), "steps, not batches"


def test_moments_from_before_the_pruning_and_clipping_see_the_kept_weights_only():
    norms = []

    class Mine(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            pruned = self.features[0].weight == 0
            assert (self.features[0].weight.grad[pruned] == 0).all()
            norms.append(self.features[0].weight.grad.norm().item())
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    class OldMoments(Callback):
        def on_train_start(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                moments = {"exp_avg": torch.ones_like(parameter), "exp_avg_sq": torch.ones_like(parameter)}
                trainer.optimizers[0].state[parameter] = {"step": torch.tensor(5.0), **moments}

    module = Mine()
    fit = trainer(OldMoments(), StatisticalPruning(Recipe(pattern="50%"), then="finetune"), max_epochs=1, gradient_clip_val=0.1)
    fit.fit(module, classifier_data(), classifier_data())
    assert len(norms) == 4
    weight = module.features[0].weight
    assert (fit.optimizers[0].state[weight]["exp_avg"][weight == 0] == 0).all()
    assert (fit.optimizers[0].state[weight]["exp_avg"][weight != 0] != 0).all()


class TwoOptimizers(Classifier):
    """Manual optimization: two optimizers that step in turns, with clipping by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.between = []

    def configure_optimizers(self):
        return torch.optim.Adam(self.features.parameters(), lr=1e-2), muon_like(self.head.parameters())

    def training_step(self, batch, batch_idx):
        features, head = self.optimizers()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        assert (self.head[0].weight.grad[self.head[0].weight == 0] == 0).all(), "before a clipping by hand"
        for optimizer in (features, head):
            self.clip_gradients(optimizer, 0.1, "norm")
            if optimizer is features or batch_idx % 2:
                optimizer.step(closure=lambda: None)
            self.between.append((self.head[0].weight == 0).float().mean().item())
            optimizer.zero_grad()


def test_several_optimizers_by_hand():
    module = TwoOptimizers()
    callback = StatisticalPruning(Recipe(pattern="50%"), then="finetune")
    trainer(callback, max_epochs=1).fit(module, classifier_data(), classifier_data())
    assert (module.features[0].weight == 0).float().mean() == 0.5
    assert set(module.between) == {0.5}
    assert callback.report.finetuning_steps == 4 + 2


def test_reduced_precision():
    module = CausalLM(tiny_llama(), learning_rate=1e-2)
    fit = trainer(finetuning(), Watch(), max_epochs=1, precision="bf16-mixed")
    fit.fit(module, loader(), loader())
    assert sparsity(module) == 0.5
    assert fit.callback_metrics["pruned_perplexity"] == pytest.approx(fit.callback_metrics["val_perplexity"].item(), rel=1e-3)


def test_transposed_storage():
    from tiny_models import gpt2

    module = CausalLM(gpt2(vocab_size=64).train(), learning_rate=1e-2)
    callback = finetuning()
    trainer(callback, max_epochs=1).fit(module, loader(), loader())
    assert {site.stored for site in callback.report.sites} == {"in_out"}
    assert all((module.model.get_parameter(site.parameter) == 0).float().mean() == 0.5 for site in callback.report.sites)


def test_an_exception_lets_the_optimizer_go_and_the_zeros_stay():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ValueError("on purpose")

    module, callback = CausalLM(tiny_llama(), learning_rate=1e-2), finetuning(probe=False)
    fit = trainer(callback, Fails(), max_epochs=1)
    with pytest.raises(ValueError, match="on purpose"):
        fit.fit(module, loader(), loader())
    assert not fit.optimizers[0]._optimizer_step_post_hooks
    assert sparsity(module) == 0.5
    trainer(callback, max_epochs=1).fit(module, loader(), loader())
    assert callback.report.finetuning_steps == 1 + 3


def test_calibrating_on_training_data_takes_no_batch_from_a_loader_that_keeps_its_workers():
    watch = Watch()
    training = loader(num_workers=1, persistent_workers=True)
    callback = StatisticalPruning(RECIPE, calibration_batches=2, then="finetune")
    trainer(watch, callback, max_epochs=1).fit(CausalLM(tiny_llama()), training, loader())
    assert watch.steps == len(training)


def test_validate_prunes_once_and_a_fit_after_it_holds_that_mask():
    module, callback = CausalLM(tiny_llama(), learning_rate=1e-2), finetuning()
    measured = trainer(callback).validate(module, loader(), verbose=False)[0]
    assert {"dense_perplexity", "pruned_perplexity"} <= measured.keys()
    pruned = {name: weight.detach().clone() for name, weight in layer_weights(module).items()}
    again = trainer(callback).validate(module, loader(), verbose=False)[0]
    assert again["pruned_perplexity"] == measured["pruned_perplexity"]
    assert all(torch.equal(weight, pruned[name]) for name, weight in layer_weights(module).items())
    trainer(callback, max_epochs=1).fit(module, loader(), loader())
    assert all(torch.equal(now, pruned[name] == 0) for name, now in zeros(module).items())
    with pytest.raises(MaskError, match="zeros, but"):
        trainer(callback, max_epochs=1).fit(CausalLM(tiny_llama()), loader(), loader())


def test_the_output_is_the_fine_tuned_model_and_keeps_its_promises(tmp_path):
    output, module = tmp_path / "sparse", CausalLM(tiny_llama(), learning_rate=1e-2)
    trainer(finetuning(output=str(output)), max_epochs=2).fit(module, loader(), loader())
    record = verify(output)
    assert record["finetuning_steps"] == 6
    assert record["sparsity"] == 0.5
    reloaded = load_model(str(output))
    assert all(torch.equal(weight, module.get_parameter(f"model.{name}")) for name, weight in reloaded.named_parameters())
    with pytest.raises(CheckpointError, match="exists"):
        trainer(finetuning(output=str(output)), max_epochs=2).fit(module, loader(), loader())


def test_every_checkpoint_has_the_zeros_and_resuming_from_any_holds_the_same_mask(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = finetuning()
    fit = trainer(first, checkpoint, max_epochs=2, enable_checkpointing=True)
    fit.fit(CausalLM(tiny_llama(), learning_rate=1e-2), loader(), loader())
    mask = zeros(fit.lightning_module)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 6
    for path in paths:
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name] == 0, now) for name, now in mask.items()), path
    for step in (2, 3):  # in the middle of an epoch, and at its end
        module, resumed = CausalLM(tiny_llama(seed=5), learning_rate=1e-2), finetuning(output=str(tmp_path / f"out{step}"))
        trainer(resumed, Watch(), max_epochs=2).fit(module, loader(), loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(now, mask[name]) for name, now in zeros(module).items())
        assert verify(tmp_path / f"out{step}")["finetuning_steps"] == 6
    # In the middle of an epoch Lightning begins its data anew, but at the end nothing tells that it had stopped.
    assert all(torch.equal(module.get_parameter(name), now) for name, now in fit.lightning_module.named_parameters())
    assert resumed.report.sites == first.report.sites

    saved = torch.load(paths[0], weights_only=True)
    saved["state_dict"]["model.model.layers.0.mlp.up_proj.weight"].fill_(0.1)
    torch.save(saved, tmp_path / "regrown.ckpt")
    with pytest.raises(MaskError, match=r"up_proj has 0 zeros, but 256 were recorded"):
        trainer(finetuning(), max_epochs=2).fit(CausalLM(tiny_llama()), loader(), loader(), ckpt_path=tmp_path / "regrown.ckpt")


def refusing(callback, path, match):
    module = CausalLM(tiny_llama(seed=5), learning_rate=1e-2)
    with pytest.raises(MaskError, match=match):
        trainer(callback, max_epochs=2).fit(module, loader(), loader(), ckpt_path=path)
    assert callback.landed is None


def test_resuming_with_another_recipe_is_refused_and_names_both(tmp_path):
    fit = trainer(finetuning(), max_epochs=1)
    fit.fit(CausalLM(tiny_llama(), learning_rate=1e-2), loader(), loader())
    fit.save_checkpoint(path := tmp_path / "sparse.ckpt")
    for recipe, told in (
        (Recipe("wanda", "50%"), r"pattern '2:4' then and '50%' now"),
        (Recipe("cvr:alpha=0.3", "2:4"), r"method 'wanda' then and 'cvr:alpha=0\.3' now"),
        ("auto:minutes=1", r"method 'wanda' then and 'auto:minutes=1' now"),
    ):
        for then in ("finetune", "stop"):
            other = StatisticalPruning(recipe, calibration=loader(), then=then)
            refusing(other, path, f"is pruned already, by another recipe: .*{told}.*Resume with the recipe that")
    other = StatisticalPruning(Recipe("wanda", "50%"), module="model", calibration=loader(), then="finetune")
    refusing(other, path, "pattern '2:4' then and '50%' now")
    with pytest.raises(MaskError, match="pruned already, by another recipe"):
        trainer(StatisticalPruning(calibration=loader())).validate(
            CausalLM(tiny_llama()), loader(), ckpt_path=path, verbose=False
        )


def test_a_checkpoint_of_an_earlier_version_goes_on_with_its_mask(tmp_path):
    """Its key spells the recipe out with other settings than this version does, and its state holds less."""
    first = finetuning()
    fit = trainer(first, max_epochs=1)
    fit.fit(CausalLM(tiny_llama(), learning_rate=1e-2), loader(), loader())
    fit.save_checkpoint(path := tmp_path / "sparse.ckpt")
    saved = torch.load(path, weights_only=True)
    old = RECIPE.to_dict()
    del old["allocation"]
    saved["callbacks"] = {"StatisticalPruning" + str({"recipe": old, "module": None}): {"landed": first.state_dict()["landed"]}}
    torch.save(saved, path)
    resumed, module = finetuning(), CausalLM(tiny_llama(seed=5), learning_rate=1e-2)
    trainer(resumed, Watch(), max_epochs=2).fit(module, loader(), loader(), ckpt_path=path)
    assert resumed.report.finetuning_steps == 6
    assert all(torch.equal(now, zeros(fit.lightning_module)[name]) for name, now in zeros(module).items())
    refusing(StatisticalPruning(calibration=loader(), then="finetune"), path, "by another recipe: method 'wanda' then")


def test_what_a_search_chose_is_in_the_checkpoint():
    chosen = {"recipe": Recipe("wanda").to_dict(), "chosen_by": {"search": {}, "seconds": 1.0}}
    first, second = (StatisticalPruning("auto:minutes=1", then="finetune") for _ in range(2))
    first._once.chosen = chosen
    second.load_state_dict(first.state_dict())
    module = CausalLM(tiny_llama(), learning_rate=1e-2)
    second.calibration = loader()
    trainer(second, max_epochs=1).fit(module, loader(), loader())  # a search would take a minute
    assert second.report.recipe == chosen["recipe"]
    assert second.report.chosen_by == chosen["chosen_by"]


@pytest.mark.parametrize("then", ["stop", "finetune"])
def test_a_training_that_diverges_is_named_and_its_weights_are_kept(then, tmp_path):
    class Diverges(CausalLM):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 2:
                self.model.lm_head.weight.data[0, 0] = torch.nan

    callback = StatisticalPruning(RECIPE, calibration=loader(), then=then, output=str(tmp_path / "out"), probe=False)
    module = Diverges(tiny_llama(), learning_rate=1e-2)
    match = r"the training left NaN or infinity in the parameter lm_head\.weight\..*trained weights are in .*out\.rescued"
    with pytest.raises(NonFiniteError, match=match):
        trainer(callback, max_epochs=1).fit(module, loader(), loader())
    kept = load_file(tmp_path / "out.rescued" / "model.safetensors")
    assert torch.isnan(kept["lm_head.weight"][0, 0])
    assert torch.equal(kept["model.norm.weight"], module.model.model.norm.weight)
    assert not (tmp_path / "out").exists()


def test_an_average_that_begins_after_the_pruning_keeps_the_zeros_and_one_from_before_is_an_error(tmp_path):
    module = CausalLM(tiny_llama(), learning_rate=1e-2)
    callback = finetuning()
    fit = trainer(EMAWeightAveraging(decay=0.5), callback, max_epochs=2)
    fit.fit(module, loader(), loader())
    assert sparsity(module) == 0.5
    assert fit.callback_metrics["pruned_sparsity"] == 0.5
    assert fit.callback_metrics["pruned_perplexity"] == pytest.approx(fit.callback_metrics["val_perplexity"].item(), rel=1e-6)

    fit.save_checkpoint(path := tmp_path / "average.ckpt")
    resumed = trainer(EMAWeightAveraging(decay=0.5), finetuning(), max_epochs=3)
    resumed.fit(CausalLM(tiny_llama(seed=5), learning_rate=1e-2), loader(), loader(), ckpt_path=path)
    assert all(torch.equal(now, zeros(module)[name]) for name, now in zeros(resumed.lightning_module).items())

    never = EMAWeightAveraging(decay=0.5, update_starting_at_step=100)
    with pytest.raises(MaskError, match="an average of weights that began before"):
        trainer(never, finetuning(), max_epochs=1).fit(CausalLM(tiny_llama()), loader(), loader())


PROCESS = """
import os, sys
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
sys.path.insert(0, sys.argv[1])
from test_callback import loader, tiny_llama, trainer
from test_finetuning import finetuning
from statprune import CausalLM

torch.set_num_threads(1)
"""
CRASH = (
    PROCESS
    + """
class Dies(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 4:
            os._exit(9)

checkpoint = ModelCheckpoint(sys.argv[2], filename="{step}", every_n_train_steps=3, save_top_k=-1)
fit = trainer(finetuning(), Dies(), checkpoint, max_epochs=2, enable_checkpointing=True)
fit.fit(CausalLM(tiny_llama(), learning_rate=1e-2), loader(), loader())
"""
)
DDP = (
    PROCESS
    + """
from test_finetuning import fit_in_two_ranks
fit_in_two_ranks(None, sys.argv[2])
"""
)


def run_process(script, tmp_path):
    (tmp_path / "run.py").write_text(textwrap.dedent(script))
    command = [sys.executable, tmp_path / "run.py", __file__.rpartition("/")[0], tmp_path]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_process_that_dies_goes_on_with_the_same_mask_and_ends_as_if_it_had_lived(tmp_path):
    done = run_process(CRASH, tmp_path)
    assert done.returncode == 9, done.stderr[-3000:]
    (checkpoint,) = tmp_path.glob("*.ckpt")
    undisturbed = CausalLM(tiny_llama(), learning_rate=1e-2)
    trainer(finetuning(), max_epochs=2).fit(undisturbed, loader(), loader())
    module, callback = CausalLM(tiny_llama(seed=5), learning_rate=1e-2), finetuning(output=str(tmp_path / "out"))
    trainer(callback, max_epochs=2).fit(module, loader(), loader(), ckpt_path=checkpoint)
    assert all(torch.equal(weight, undisturbed.get_parameter(name)) for name, weight in module.named_parameters())
    assert verify(tmp_path / "out")["finetuning_steps"] == 6


def fit_in_two_ranks(rank, folder):
    module = CausalLM(tiny_llama(), learning_rate=1e-2)
    fit = trainer(finetuning(output=f"{folder}/out"), max_epochs=2, devices=2, strategy="ddp", num_sanity_val_steps=0)

    def save_large(*arguments, **settings):
        # The other rank waits. A rank that has not met the others would lose its patience with a model of many gigabytes.
        assert [conversation.has_met for conversation in ranks._CONVERSATIONS] == [True]
        return save(*arguments, **settings)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("statprune.training.once.save", save_large)
        fit.fit(module, loader(), loader())
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    torch.save((dict(module.state_dict()), metrics), f"{folder}/{fit.global_rank}")


def both_hold_one_mask_and_train_alike(folder):
    (weights, metrics), (others, other_metrics) = (torch.load(folder / rank, weights_only=True) for rank in "01")
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name
        if "layers" in name and weight.ndim == 2:
            assert (weight == 0).float().mean() == 0.5, name
    for name in ("pruned_perplexity", "pruned_sparsity", "pruned_energy_ratio"):
        assert metrics[name] == other_metrics[name], name
    assert verify(folder / "out")["finetuning_steps"] == 4
    assert remeasure(PruningReport.from_dict(verify(folder / "out")), load_model(str(folder / "out"))).sparsity == 0.5


def test_two_ddp_ranks_hold_one_mask_and_train_alike(tmp_path, two_ranks):
    two_ranks(fit_in_two_ranks, str(tmp_path))
    both_hold_one_mask_and_train_alike(tmp_path)


@pytest.mark.slow
def test_ranks_that_lightning_starts_hold_one_mask_and_train_alike(tmp_path):
    done = run_process(DDP, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    both_hold_one_mask_and_train_alike(tmp_path)
