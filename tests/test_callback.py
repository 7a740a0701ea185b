import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import statprune
from statprune import CausalLM, Perplexity, Recipe, Search, StatisticalPruning, TextData
from statprune.checkpoint import verify
from statprune.errors import CalibrationError, CheckpointError, MaskError, NonFiniteError, RanksError, SiteError
from statprune.loading import load_model
from statprune.model import layers
from statprune.report import PruningReport
from statprune.training import figures
from statprune.training.modules import WindowDataset

TOKENS = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loader(tokens=TOKENS, **settings):
    return DataLoader(WindowDataset(tokens), batch_size=8, **settings)


def trainer(*callbacks, **settings):
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **settings})


def layer_weights(model):
    return {name: weight for name, weight in model.named_parameters() if "layers" in name and weight.ndim == 2}


def sparsity(model):
    weights = layer_weights(model).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


class SnapshotAtTrainEnd(Callback):
    """Stands before the pruning callback, so it sees what training left."""

    def on_train_end(self, trainer, pl_module):
        self.weights = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}


def trained_weights(*callbacks):
    snapshot = SnapshotAtTrainEnd()
    torch.manual_seed(1)
    fit = trainer(snapshot, *callbacks, max_epochs=2, num_sanity_val_steps=1)
    fit.fit(CausalLM(tiny_llama(), learning_rate=1e-2), loader(shuffle=True), loader())
    return snapshot.weights, fit


@pytest.fixture
def traced(monkeypatch):
    """One entry for each time that a graph is asked for."""
    trace, asked = layers.trace, []
    monkeypatch.setattr(layers, "trace", lambda *inputs: asked.append(inputs) or trace(*inputs))
    return asked


def test_a_probe_at_every_validation_leaves_training_bit_for_bit_as_it_was_and_the_end_prunes(traced):
    undisturbed, _ = trained_weights()
    callback = StatisticalPruning(Recipe(pattern="2:4"), calibration_batches=2)
    probed, fit = trained_weights(callback)
    assert all(torch.equal(probed[name], weight) for name, weight in undisturbed.items())
    assert sparsity(fit.lightning_module) == 0.5
    assert callback.report.sparsity == 0.5
    assert len(traced) == 1
    assert fit.lightning_module.training
    metrics = fit.callback_metrics
    assert metrics["dense_perplexity"] == pytest.approx(metrics["val_perplexity"].item(), rel=1e-6)
    assert metrics["pruned_perplexity"] != pytest.approx(metrics["dense_perplexity"].item(), rel=1e-6)
    assert metrics["pruned_sparsity"] == 0.5
    assert 0 < metrics["pruned_output_error"] < 1
    assert metrics["pruned_energy_ratio"] == pytest.approx(1, abs=0.1)


def test_the_probe_sees_what_landing_gives():
    """A last validation and the commit after it see the same weights, so they must prune alike."""
    callback = StatisticalPruning(Recipe("wanda", "50%"), calibration=loader())
    _, fit = trained_weights(callback)
    measured = fit.callback_metrics["pruned_perplexity"].item()
    again = trainer().validate(fit.lightning_module, loader(), verbose=False)[0]
    assert again["val_perplexity"] == pytest.approx(measured, rel=1e-6)


def test_nothing_happens_during_the_sanity_check():
    callback = StatisticalPruning(Recipe(pattern="2:4"))

    class AfterSanityCheck(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            assert callback.report is None
            assert sparsity(pl_module) == 0
            self.ran = True

    check = AfterSanityCheck()
    fit = trainer(callback, check, max_steps=1, num_sanity_val_steps=2, limit_val_batches=1, check_val_every_n_epoch=5)
    fit.fit(CausalLM(tiny_llama()), loader(), loader())
    assert check.ran


def test_validate_prunes_first_and_then_measures_the_pruned_model():
    module = CausalLM(tiny_llama())
    dense = Perplexity()
    with torch.no_grad():
        dense.update_next_token(module(TOKENS), TOKENS)
    callback = StatisticalPruning(Recipe(pattern="2:4"), calibration=loader())
    measured = trainer(callback).validate(module, loader(), verbose=False)[0]
    assert measured["dense_perplexity"] == pytest.approx(dense.compute().item(), rel=1e-6)
    assert measured["pruned_perplexity"] == pytest.approx(measured["val_perplexity"], rel=1e-6)
    assert measured["pruned_perplexity"] != measured["dense_perplexity"]
    assert sparsity(module) == 0.5
    weight = module.model.model.layers[0].mlp.up_proj.weight
    assert not weight.is_inference()
    assert weight.requires_grad
    module(TOKENS).sum().backward()


def test_what_validate_reports_matches_the_weights_in_reduced_precision_too():
    module = CausalLM(tiny_llama())
    measured = trainer(StatisticalPruning(calibration=loader()), precision="bf16-mixed").validate(
        module, loader(), verbose=False
    )[0]
    assert measured["pruned_perplexity"] == pytest.approx(measured["val_perplexity"], rel=1e-3)
    assert sparsity(module) == 0.5


def test_a_checkpoint_can_be_chosen_by_pruned_perplexity_and_has_no_keys_of_ours(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="pruned_perplexity")
    fit = trainer(StatisticalPruning(), checkpoint, max_epochs=1, enable_checkpointing=True)
    fit.fit(CausalLM(tiny_llama()), loader(), loader())
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert checkpoint.best_model_score == fit.callback_metrics["pruned_perplexity"]
    assert saved["state_dict"].keys() == CausalLM(tiny_llama()).state_dict().keys()
    assert not any((weight == 0).all() for name, weight in saved["state_dict"].items() if "proj" in name)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_two_callbacks_have_two_states_and_take_their_own_from_a_checkpoint(tmp_path):
    fit = trainer(StatisticalPruning(Recipe(pattern="2:4")), StatisticalPruning(Recipe(pattern="50%")), max_epochs=1)
    fit.fit(Classifier(), classifier_data(), classifier_data())
    assert len({callback.state_key for callback in fit.callbacks if isinstance(callback, StatisticalPruning)}) == 2
    fit.save_checkpoint(tmp_path / "both.ckpt")
    again = [StatisticalPruning(Recipe(pattern=pattern)) for pattern in ("50%", "2:4")]
    trainer(*again).validate(Classifier(), classifier_data(), ckpt_path=tmp_path / "both.ckpt", verbose=False)
    assert [callback.landed["recipe"]["pattern"]["name"] for callback in again] == ["unstructured", "nm"]


class Classifier(LightningModule):
    """Somebody else's module: tuples for batches, no logits object, a frozen part in eval mode."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def classifier_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()), batch_size=16)


# What is pruned is pruned once, in every order of calls.


def classifying(then="stop", **settings):
    return StatisticalPruning(Recipe(pattern="50%"), calibration=classifier_data(), then=then, **settings)


def validated(callback, module, **settings):
    return trainer(callback).validate(module, classifier_data(), verbose=False, **settings)[0]


def fitted(callback, module, *others, max_epochs=1, **settings):
    fit = trainer(callback, *others, max_epochs=max_epochs, enable_checkpointing=bool(others))
    fit.fit(module, classifier_data(), classifier_data(), **settings)
    return fit


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def unchanged(module, before):
    return all(torch.equal(weight, before[name]) for name, weight in module.named_parameters())


@pytest.mark.parametrize("then", ["stop", "finetune"])
def test_a_second_validate_measures_what_the_first_one_pruned(then):
    module, callback = Classifier(), classifying(then)
    first = validated(callback, module)
    before = weights_of(module)
    callback._batches, callback.calibration = None, ()  # pruning again would have nothing to calibrate on
    second = validated(callback, module)
    assert unchanged(module, before)
    assert "dense_perplexity" in first
    assert second == {name: value for name, value in first.items() if name != "dense_perplexity"}
    with torch.no_grad():
        module.head[0].weight[module.head[0].weight == 0] = 0.1
    with pytest.raises(MaskError, match=r"head\.0 has 0 zeros, but 256 were recorded .* with a new StatisticalPruning"):
        validated(callback, module)


def test_validate_after_fit_measures_what_fit_pruned_at_its_end():
    module, callback = Classifier(), classifying()
    fitted(callback, module)
    before = weights_of(module)
    measured = validated(callback, module)
    assert unchanged(module, before)
    assert measured["pruned_perplexity"] == pytest.approx(math.exp(measured["val_loss"]), rel=1e-5)
    assert measured["pruned_sparsity"] == callback.report.sparsity == 0.5
    assert "dense_perplexity" not in measured


@pytest.mark.parametrize("prune_first", [validated, fitted])
def test_fit_refuses_to_train_the_zeros_away_and_a_new_callback_starts_anew(prune_first):
    module, callback = Classifier(), classifying()
    prune_first(callback, module)
    before = weights_of(module)
    with pytest.raises(MaskError, match=r'\(then="stop"\) has pruned this model already, .* then="finetune".* a new Stat'):
        fitted(callback, module)
    assert unchanged(module, before)
    fitted(classifying(), module)
    assert not unchanged(module, before)
    assert (module.features[0].weight == 0).float().mean() == 0.5


def test_fine_tuning_goes_on_in_a_second_fit_and_validate_then_measures_it():
    module, callback = Classifier(), classifying("finetune")
    validated(callback, module)
    pruned = module.features[0].weight == 0
    for steps in (4, 8):
        fitted(callback, module)
        assert callback.report.finetuning_steps == steps
        assert torch.equal(module.features[0].weight == 0, pruned)
    tuned = callback.report
    before = weights_of(module)
    measured = validated(callback, module)
    assert unchanged(module, before)
    assert measured["pruned_energy_ratio"] == pytest.approx(tuned.energy_ratio, rel=1e-6)
    assert callback.report == tuned


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_a_checkpoint_says_whether_its_weights_are_pruned(tmp_path):
    checkpoint, module = ModelCheckpoint(tmp_path, filename="dense"), Classifier()
    fit = fitted(callback := classifying(), module, checkpoint)
    fit.save_checkpoint(tmp_path / "pruned.ckpt")
    landed = weights_of(module)

    resumed, restored = StatisticalPruning(Recipe(pattern="50%")), Classifier()  # nothing to calibrate on
    measured = validated(resumed, restored, ckpt_path=tmp_path / "pruned.ckpt")
    assert unchanged(restored, landed)
    assert measured["pruned_perplexity"] == pytest.approx(math.exp(measured["val_loss"]), rel=1e-5)
    assert resumed.report.sites == callback.report.sites
    assert resumed.landed["global_step"] == 4
    with pytest.raises(MaskError, match="has pruned this model already, after step 4"):
        fitted(classifying(), Classifier(), ckpt_path=tmp_path / "pruned.ckpt", max_epochs=2)

    fitted(tuning := classifying("finetune"), tuned := Classifier(), ckpt_path=tmp_path / "pruned.ckpt", max_epochs=2)
    assert torch.equal(tuned.features[0].weight == 0, landed["features.0.weight"] == 0)
    assert tuning.report.finetuning_steps == 4

    # The one that was written while the model was dense: pruned in validate, trained on in fit.
    assert "dense_perplexity" in validated(callback, restored, ckpt_path=tmp_path / "dense.ckpt")
    assert (restored.features[0].weight == 0).float().mean() == 0.5
    fitted(resumed := classifying(), Classifier(), ckpt_path=tmp_path / "dense.ckpt", max_epochs=2)
    assert resumed.landed["global_step"] == 8

    saved = torch.load(tmp_path / "pruned.ckpt", weights_only=True)
    saved["state_dict"]["features.0.weight"].fill_(0.1)
    torch.save(saved, tmp_path / "regrown.ckpt")
    with pytest.raises(MaskError, match=r"features\.0 has 0 zeros, but 128 were recorded"):
        validated(classifying(), Classifier(), ckpt_path=tmp_path / "regrown.ckpt")


# What cannot be pruned or written is refused before anything runs.


@pytest.mark.parametrize("then", ["stop", "finetune"])
@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_otherwise_than_fsdp2_are_refused_by_name(kind, then):
    strategy = object.__new__(kind)  # DeepSpeed's would look for its package
    for stage in ("fit", "validate"):
        with pytest.raises(SiteError, match=rf'under {kind.__name__}: .* ModelParallelStrategy, .* strategy="ddp"'):
            classifying(then).setup(SimpleNamespace(strategy=strategy), Classifier(), stage)
    classifying(then).setup(SimpleNamespace(strategy=strategy), Classifier(), "test")


@pytest.mark.parametrize("then", ["stop", "finetune"])
def test_parameters_that_something_else_than_fsdp2_sharded_are_refused_by_name(then, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module, single = Classifier(), SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
        classifying(then).setup(single, module, "fit")
        layer = module.head[2]
        layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), init_device_mesh("cpu", (1,))))
        for refuse in (
            lambda callback: callback.setup(single, module, "fit"),
            lambda callback: callback.setup(single, module, "validate"),
            lambda callback: callback.on_fit_start(single, module),  # sharded in configure_model
        ):
            with pytest.raises(SiteError, match=r"head\.2\.weight is sharded .* by something else than fully_shard"):
                refuse(classifying(then))
    finally:
        torch.distributed.destroy_process_group()


def test_any_module_is_an_output(tmp_path):
    for name, run in (("fitted", fitted), ("validated", validated)):
        run(classifying(output=str(tmp_path / name)), module := Classifier())
        assert verify(tmp_path / name)["base"] == {"class": "Classifier", "library": "pytorch"}
        assert torch.equal(load_file(tmp_path / name / "model.safetensors")["head.0.weight"], module.head[0].weight)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "file").write_text("no folder")
    module = Classifier()
    before = weights_of(module)
    for run, then in itertools.product((fitted, validated), ("stop", "finetune")):
        if (run, then) == (validated, "finetune"):
            continue  # writes nothing
        with pytest.raises(CheckpointError, match=r"file/out' cannot be written"):
            run(classifying(then, output=str(tmp_path / "file" / "out")), module)
    assert unchanged(module, before)


def test_a_model_that_cannot_be_saved_is_refused_before_anything_is_trained(tmp_path):
    module = Classifier()
    module.head[2].register_buffer("scale", torch.ones(2).to_sparse())
    before = weights_of(module)
    for run in (fitted, validated):
        with pytest.raises(CheckpointError, match=r"head\.2\.scale is no dense tensor"):
            run(classifying(output=str(tmp_path / "out")), module)
    assert unchanged(module, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("then", ["stop", "finetune"])
def test_any_module_is_written_as_safetensors_that_keep_what_is_promised(then, tmp_path):
    module, output = Classifier(), tmp_path / "out"
    fitted(classifying(then, output=str(output)), module)
    assert verify(output)["sparsity"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    restored = Classifier()
    safetensors.torch.load_model(restored, output / "model.safetensors")
    assert unchanged(restored, weights_of(module))


def test_what_was_trained_is_kept_where_the_end_of_the_training_fails(tmp_path):
    """Calibration data with NaN in it: seen when the training has ended."""
    module = Classifier()
    bad = StatisticalPruning(Recipe(pattern="50%"), calibration=[torch.full((4, 8), torch.nan)], output=str(tmp_path / "out"),
                             probe=False)  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in the input .* The trained weights are in .*out\.rescued"):
        fitted(bad, module)
    kept = safetensors.torch.load_file(tmp_path / "out.rescued" / "model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in module.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["out.rescued"]


def test_an_error_of_somebody_else_s_keeps_the_weights_too_and_says_so(tmp_path):
    def fails():
        raise KeyError("somebody else's")
        yield

    with pytest.raises(KeyError) as caught:
        fitted(StatisticalPruning(calibration=fails(), output=str(tmp_path / "out"), probe=False), Classifier())
    assert "The trained weights are in" in caught.value.__notes__[-1]
    assert (tmp_path / "out.rescued" / "model.safetensors").is_file()


def test_a_classifier_that_somebody_else_wrote():
    torch.manual_seed(0)
    module = Classifier()
    fit = trainer(StatisticalPruning(Recipe(pattern="50%")), max_epochs=1)
    fit.fit(module, classifier_data(), classifier_data())
    assert fit.callback_metrics["dense_perplexity"] == pytest.approx(fit.callback_metrics["val_loss"].exp().item(), rel=1e-5)
    assert "pruned_perplexity" in fit.callback_metrics
    assert (module.features[0].weight == 0).float().mean() == 0.5
    assert (module.head[0].weight == 0).float().mean() == 0.5
    assert (module.head[2].weight != 0).all(), "the layer that feeds the output stays dense"


def test_a_model_that_changes_is_traced_anew(traced):
    class Counts(Classifier):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x)

    module = Counts()
    trainer(StatisticalPruning(Recipe(pattern="50%")), max_epochs=2).fit(module, classifier_data(), classifier_data())
    assert module.calls == 8
    assert len(traced) == 2  # nothing is called between the second validation and the end
    assert (module.features[0].weight == 0).float().mean() == 0.5


class Reports(Callback):
    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(self.pruning.report)


def test_a_search_chooses_once_and_every_report_says_so(monkeypatch):
    record, searched = {"perplexity": 2.0, "seconds": 1.5}, []
    found = SimpleNamespace(recipe=Recipe("magnitude", "50%"), record=lambda: record)
    monkeypatch.setattr("statprune.tuning.tune.search_recipe", lambda *call, **others: searched.append(call) or found)
    monkeypatch.setattr("statprune.tuning.halves.check_has_perplexity", lambda model: None)  # of a classifier
    pruning, module = StatisticalPruning("auto:minutes=1", pattern="50%"), Classifier()
    assert pruning.recipe == Search("50%", 1)
    key, reports = pruning.state_key, Reports(pruning)
    trainer(pruning, reports, max_epochs=2, num_sanity_val_steps=0).fit(module, classifier_data(), classifier_data())
    assert len(searched) == 1
    for report in (*reports.seen, pruning.report, PruningReport.from_dict(pruning.landed["report"])):
        assert report.recipe == found.recipe.to_dict()
        assert report.chosen_by == {"search": pruning.recipe.to_dict(), **record}
    assert len({id(report) for report in (*reports.seen, pruning.report)}) == 3
    assert pruning.state_key == key
    assert pruning.report.sparsity == 0.5


def test_a_module_says_how_its_batches_become_inputs():
    class Odd(Classifier):
        def forward(self, x, scale):
            return super().forward(x * scale)

        def calibration_inputs(self, batch):
            return {"x": batch[0], "scale": torch.tensor(2.0)}

    module = Odd()
    callback = StatisticalPruning(Recipe(pattern="50%"), calibration=classifier_data())
    inputs = callback._calibration_inputs(trainer(), module, module)
    assert inputs[0].kwargs["scale"] == 2


def test_calibration_data_is_never_the_validation_data_by_itself():
    with pytest.raises(CalibrationError, match="calibration_dataloader"):
        trainer(StatisticalPruning()).validate(CausalLM(tiny_llama()), loader(), verbose=False)


def test_a_module_that_does_not_exist_is_named():
    with pytest.raises(CalibrationError, match=r"module='body'.*it has model"):
        trainer(StatisticalPruning(module="body", calibration=loader())).validate(
            CausalLM(tiny_llama()), loader(), verbose=False
        )


def test_the_output_is_a_verified_model_folder_and_is_never_overwritten(tmp_path):
    output = tmp_path / "sparse"
    module = CausalLM(tiny_llama())
    callback = StatisticalPruning(calibration=loader(), output=str(output))
    trainer(callback).validate(module, loader(), verbose=False)
    assert verify(output)["sparsity"] == 0.5
    reloaded = load_model(str(output))
    assert all(torch.equal(weight, module.get_parameter(f"model.{name}")) for name, weight in reloaded.named_parameters())
    trainer(callback).validate(module, loader(), verbose=False)  # measures, and writes nothing
    before = weights_of(module)
    for then in ("stop", "finetune"):
        another = StatisticalPruning(calibration=loader(), output=str(output), then=then)
        with pytest.raises(CheckpointError, match="exists"):
            trainer(another, max_epochs=1).fit(module, loader(), loader())
    with pytest.raises(CheckpointError, match="exists"):
        trainer(StatisticalPruning(calibration=loader(), output=str(output))).validate(module, loader(), verbose=False)
    assert unchanged(module, before)


class Unmeasured(CausalLM):
    """Only the callback runs the model."""

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        pass


@pytest.mark.parametrize("then", ["stop", "finetune"])
def test_a_compiled_model_is_trained_pruned_and_written(then, tmp_path):
    module = CausalLM(tiny_llama())
    module.model = torch.compile(module.model, backend="eager")
    callback = StatisticalPruning(calibration=loader(), output=str(tmp_path / "out"), then=then, probe=False)
    trainer(callback, max_epochs=1).fit(module, loader(), loader())
    assert verify(tmp_path / "out")["sparsity"] == 0.5
    trained, restored = module.model._orig_mod, load_model(str(tmp_path / "out"))
    assert all(torch.equal(weight, trained.get_parameter(name)) for name, weight in restored.named_parameters())


def test_a_compiled_model_is_pruned_and_written_like_any_other(tmp_path):
    module, plain = Unmeasured(tiny_llama()), tiny_llama()
    model, module.model = module.model, torch.compile(module.model, backend="eager")
    assert StatisticalPruning(module="model")._target(module) is model
    callback = StatisticalPruning(calibration=loader(), output=str(tmp_path / "out"))
    trainer(callback).validate(module, loader(), verbose=False)
    statprune.prune(plain, loader(), callback.recipe)
    assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in plain.named_parameters())
    assert verify(tmp_path / "out")["sparsity"] == 0.5


def test_measuring_makes_no_key_value_cache():
    module, caches = Unmeasured(tiny_llama()), []
    module.model.register_forward_hook(lambda model, args, output: caches.append(output.get("past_key_values")))
    trainer(StatisticalPruning(calibration=loader())).validate(module, loader(), verbose=False)
    assert len(caches) >= 2 * len(loader())
    assert not any(caches)
    assert module.model.config.use_cache


YAML = """
seed_everything: 0
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  enable_progress_bar: false
  callbacks:
    - class_path: statprune.StatisticalPruning
      init_args:
        recipe:
          criterion: {name: cvr, alpha: 0.25}
          pattern: "2:4"
          compensation: {name: energy, clamp: [0.5, 2.0]}
          ignore: ["*.mlp.down_proj"]
        calibration_batches: 2
        then: finetune
model:
  model: %(model)s
data:
  tokenizer: %(model)s
  train: [%(text)s]
  validation: [%(text)s]
  seqlen: 16
  batch_size: 4
  train_samples: 8
"""


def test_lightning_cli_builds_everything_from_yaml(tmp_path, tiny_model_folder, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 40)
    (tmp_path / "config.yaml").write_text(YAML % {"model": tiny_model_folder, "text": text})
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    monkeypatch.setattr(sys, "argv", ["train.py", "validate", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(CausalLM, TextData, save_config_callback=None, seed_everything_default=0)
    weights = dict(cli.model.named_parameters())
    assert (weights["model.model.layers.0.mlp.up_proj.weight"] == 0).float().mean() == 0.5
    assert (weights["model.model.layers.0.mlp.down_proj.weight"] != 0).all()
    callback = next(one for one in cli.trainer.callbacks if isinstance(one, StatisticalPruning))
    assert callback.recipe.criterion["alpha"] == 0.25
    assert callback.then == "finetune"
    assert all(part.training for part in cli.model.modules()), "what fit trains"


CALLBACK_YAML = """
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: statprune.StatisticalPruning
      init_args: {%s}
"""


def callback_from_yaml(init_args, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CALLBACK_YAML % init_args)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Classifier, run=False, save_config_callback=None, seed_everything_default=0)
    return next(one for one in cli.trainer.callbacks if isinstance(one, StatisticalPruning))


@pytest.mark.parametrize(
    ("init_args", "expected"),
    [
        ("probe: false", Recipe()),
        ("recipe: cvr+energy", Recipe("cvr+energy")),
        ('recipe: wanda, pattern: "4:8"', Recipe("wanda", "4:8")),
        ("recipe: 'auto:minutes=5', pattern: 50%", Search("50%", 5)),
        ('recipe: {method: cvr+energy, pattern: "2:4", schedule: block}', Recipe("cvr+energy", "2:4", "block")),
        ('recipe: {method: auto, minutes: 5, pattern: "2:4", ignore: ["1e5", a]}', Search("2:4", 5, ignore=("1e5", "a"))),
        (
            "recipe: {criterion: wanda, compensation: [{name: energy, clamp: [0.9, 1]}], pattern: {name: nm, keep: 2, of: 4}}",
            Recipe("wanda+energy:clamp=[0.9,1]", "2:4"),
        ),
    ],
)
def test_lightning_cli_takes_every_way_to_say_how(init_args, expected, tmp_path, monkeypatch):
    assert callback_from_yaml(init_args, tmp_path, monkeypatch).recipe == expected


@pytest.mark.parametrize("init_args", ["recipe: {method: wanda, pattern: 2:4}", "recipe: wanda, pattern: 2:4"])
def test_a_pattern_that_yaml_takes_for_a_number_is_explained(init_args, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="In YAML, quote it"):
        callback_from_yaml(init_args, tmp_path, monkeypatch)


# Loggers.


class OnlyMetrics(Logger):
    """As somebody's own logger may be: numbers and nothing else."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    name = version = "only"

    def log_hyperparams(self, params, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        assert all(isinstance(value, int | float) for value in metrics.values())
        self.seen.update(metrics)


LOGGED = {"dense_perplexity", "pruned_perplexity", "pruned_output_error", "pruned_sparsity", "pruned_energy_ratio"}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("then", ["stop", "finetune"])
def test_what_is_logged_reaches_every_logger_and_tensorboard_also_gets_pictures(then, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = LOGGED if then == "stop" else {"pruned_perplexity", "pruned_sparsity", "pruned_energy_ratio"}
    own, csv, board = OnlyMetrics(), CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    module = Classifier()
    fit = trainer(classifying(then), max_epochs=2, logger=[own, csv, board], log_every_n_steps=1, num_sanity_val_steps=1)
    fit.fit(module, classifier_data(), classifier_data())
    assert own.seen.keys() >= logged
    assert logged <= set((Path(csv.log_dir) / "metrics.csv").read_text().splitlines()[0].split(","))
    board.experiment.flush()
    events = accumulator.EventAccumulator(board.log_dir, {"images": 0, "histograms": 0})
    events.Reload()
    assert logged <= set(events.Tags()["scalars"])
    probes = {"stop": [4, 8, 8], "finetune": [0]}[then]  # each probe, and what has landed
    assert [event.step for event in events.Images("pruned_layers")] == probes
    assert set(events.Tags()["histograms"]) == {"pruned_kept_weights/features.0", "pruned_kept_weights/head.0"}
    last = events.Histograms("pruned_kept_weights/head.0")[-1].histogram_value
    assert last.num == 256, "half of 16 x 32"


def test_histograms_are_of_a_bounded_sample_by_kind_of_layer(monkeypatch):
    model = CausalLM(tiny_llama()).model
    report = statprune.prune(model, loader(), "wanda")
    kept = figures.kept_weights(report, model.get_parameter)
    assert kept.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {kind: len(values) for kind, values in kept.items()}["up_proj"] == 16 * 32 // 2
    monkeypatch.setattr(figures, "MOST_VALUES", 700)
    assert sum(len(values) for values in figures.kept_weights(report, model.get_parameter).values()) <= 700
    monkeypatch.setattr(figures, "MOST_KINDS", 3)
    assert figures.kept_weights(report, model.get_parameter).keys() == {"all layers"}


def test_without_matplotlib_there_is_no_figure(monkeypatch):
    model = CausalLM(tiny_llama()).model
    report = statprune.prune(model, loader(), "wanda")
    figure = figures.layer_figure(report)
    assert [len(axis.patches) for axis in figure.axes] == [7, 7]
    assert figure.axes[0].patches[0].get_height() == 50
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert figures.layer_figure(report) is None


# Several ranks.


def _weights_and_metrics(rank, devices):
    module = CausalLM(tiny_llama())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    # Two ranks see half of the windows each, one rank sees all of them.
    fit = trainer(
        StatisticalPruning(Recipe("paper", "2:4")), max_epochs=1, num_sanity_val_steps=0,
        devices=devices, strategy="ddp" if devices > 1 else "auto",
    )  # fmt: skip
    every = DataLoader(WindowDataset(TOKENS), batch_size=4)
    fit.fit(module, every, every)
    return module.state_dict(), {name: value.item() for name, value in fit.callback_metrics.items()}


def test_two_ddp_ranks_prune_alike_and_as_one_process_with_all_the_data(two_ranks):
    (first, metrics), (second, _) = two_ranks(_weights_and_metrics, 2)
    one, metrics_of_one = _weights_and_metrics(0, 1)
    for name, weight in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], weight, atol=1e-6), name
        assert torch.equal(first[name] == 0, weight == 0), name
    for name in ("dense_perplexity", "pruned_perplexity", "pruned_output_error", "pruned_sparsity"):
        assert metrics[name] == pytest.approx(metrics_of_one[name], rel=1e-5), name


class Calibrated(CausalLM):
    def calibration_dataloader(self):
        return DataLoader(WindowDataset(TOKENS), batch_size=4)


def _validated_on_ranks(rank, devices, sampler, limit):
    module = Calibrated(tiny_llama())
    given = {}
    if sampler:
        samples = DistributedSampler(TOKENS, num_replicas=devices, rank=rank, shuffle=False)
        given = {"calibration": DataLoader(WindowDataset(TOKENS), batch_size=2, sampler=samples)}
    callback = StatisticalPruning(Recipe("paper", "2:4"), calibration_batches=limit, **given)
    run = trainer(callback, devices=devices, strategy="ddp" if devices > 1 else "auto")
    run.validate(module, DataLoader(WindowDataset(TOKENS), batch_size=4), verbose=False)
    metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    return module.state_dict(), callback.report.num_tokens, callback.report.num_batches, metrics


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.parametrize(("sampler", "limit", "num_tokens"), [(False, 128, 384), (False, 3, 192), (True, 128, 384)])
def test_two_ranks_share_the_calibration_batches_and_count_every_token_once(two_ranks, sampler, limit, num_tokens):
    (first, tokens, batches, metrics), (second, same, _, _) = two_ranks(_validated_on_ranks, 2, sampler, limit)
    one, tokens_of_one, batches_of_one, metrics_of_one = _validated_on_ranks(0, 1, False, limit)
    assert tokens == same == tokens_of_one == num_tokens
    assert batches < batches_of_one or sampler
    for name, weight in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], weight, atol=1e-6), name
        assert torch.equal(first[name] == 0, weight == 0), name
    assert metrics["pruned_perplexity"] == pytest.approx(metrics_of_one["pruned_perplexity"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_a_rank_without_a_calibration_batch_is_an_error_on_all(two_ranks):
    for outcome in two_ranks.outcomes(_validated_on_ranks, 2, False, 1):
        assert isinstance(outcome, CalibrationError)
        assert "1 of the 2 batches that 2 ranks need" in str(outcome)


class LostDisk(WindowDataset):
    def __getitem__(self, index):
        raise OSError("the disk is gone")


def _failures_on_one_rank(rank, folder):
    """What this rank hears in each case, and whether the model is as it was."""
    heard = {}

    def run(case, verb, *, steps=0, **settings):
        module = Calibrated(tiny_llama())
        before = {name: weight.clone() for name, weight in module.state_dict().items()}
        fit = trainer(StatisticalPruning(Recipe(pattern="2:4"), **settings), devices=2, strategy="ddp", max_steps=steps)
        data = [DataLoader(WindowDataset(TOKENS), batch_size=4)] * (2 if verb == "fit" else 1)
        try:
            getattr(fit, verb)(module, *data)
        except Exception as e:
            heard[case] = type(e), str(e), all(torch.equal(module.state_dict()[name], before[name]) for name in before)

    lost = DataLoader((LostDisk if rank == 1 else WindowDataset)(TOKENS), batch_size=4)
    run("loader", "validate", calibration=lost)
    run("place", "fit", steps=1, output=f"{folder}/{'there' if rank == 0 else 'free'}")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rank == 0:
            monkeypatch.setattr("statprune.training.once.save", _full_disk)
        run("save", "fit", steps=1, probe=False, output=f"{folder}/out")
    run("trained", "fit", steps=1, probe=False, calibration=lost, output=f"{folder}/trained")
    return heard


def _full_disk(*arguments, **settings):
    raise CheckpointError("no space left")


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_a_loader_or_a_save_that_fails_on_one_rank_is_an_error_on_both(two_ranks, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    first, second = two_ranks(_failures_on_one_rank, str(tmp_path))
    for case, who, other, number, kind, text in (
        ("loader", second, first, 1, OSError, "the disk is gone"),
        ("place", first, second, 0, CheckpointError, "exists"),
        ("save", first, second, 0, CheckpointError, "no space left"),
        ("trained", second, first, 1, OSError, "the disk is gone"),
    ):
        assert issubclass(who[case][0], kind), case
        assert text in who[case][1], case
        assert other[case][0] is RanksError, case
        assert f"rank {number} failed: {who[case][0].__name__}: " in other[case][1], case
        assert text in other[case][1], case
        assert who[case][2] == other[case][2] == (case in ("loader", "place")), case
    assert "The trained weights are in " in first["trained"][1]
    assert (tmp_path / "trained.rescued" / "model.safetensors").is_file()
