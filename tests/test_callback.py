import subprocess
import sys
import textwrap

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from statprune import CausalLM, Perplexity, Recipe, StatisticalPruning, TextData
from statprune.checkpoint import verify
from statprune.errors import CalibrationError, CheckpointError
from statprune.loading import load_model
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


def test_a_probe_at_every_validation_leaves_training_bit_for_bit_as_it_was_and_the_end_prunes():
    undisturbed, _ = trained_weights()
    callback = StatisticalPruning(Recipe(pattern="2:4"), calibration_batches=2)
    probed, fit = trained_weights(callback)
    assert all(torch.equal(probed[name], weight) for name, weight in undisturbed.items())
    assert sparsity(fit.lightning_module) == 0.5
    assert callback.report.sparsity == 0.5
    assert fit.lightning_module.training
    metrics = fit.callback_metrics
    assert metrics["dense_perplexity"] == pytest.approx(metrics["val_perplexity"].item(), rel=1e-6)
    assert metrics["pruned_perplexity"] != pytest.approx(metrics["dense_perplexity"].item(), rel=1e-6)
    assert metrics["pruned_sparsity"] == 0.5
    assert 0 < metrics["pruned_output_error"] < 1
    assert metrics["pruned_energy_ratio"] == pytest.approx(1, abs=0.1)


def test_the_probe_sees_what_landing_gives():
    """A last validation and the commit after it see the same weights, so they must prune alike."""
    callback = StatisticalPruning(Recipe.parse("wanda", pattern="50%"), dataloader=loader())
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
    callback = StatisticalPruning(Recipe(pattern="2:4"), dataloader=loader())
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
    measured = trainer(StatisticalPruning(dataloader=loader()), precision="bf16-mixed").validate(
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


@pytest.mark.parametrize("weights_only", [False, True])
def test_zeros_and_state_survive_save_and_resume(tmp_path, weights_only):
    recipe = Recipe.parse("wanda", pattern="2:4")
    first = StatisticalPruning(recipe)
    fit = trainer(first, max_epochs=1)
    fit.fit(CausalLM(tiny_llama()), loader(), loader())
    fit.save_checkpoint(tmp_path / "pruned.ckpt", weights_only=weights_only)
    landed = {name: weight.clone() for name, weight in fit.lightning_module.named_parameters()}

    second, module = StatisticalPruning(recipe, dataloader=loader()), CausalLM(tiny_llama(seed=5))
    trainer(second).validate(module, loader(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
    assert all(torch.equal(weight, landed[name]) for name, weight in module.named_parameters()), "pruning twice adds nothing"
    if not weights_only:
        resumed = StatisticalPruning(recipe)
        go_on = trainer(resumed, max_epochs=2)
        go_on.fit(CausalLM(tiny_llama()), loader(), loader(), ckpt_path=tmp_path / "pruned.ckpt")
        assert resumed.landed["global_step"] == 2 * len(loader())
        assert first.state_dict()["landed"]["sparsity"] == 0.5


def test_two_callbacks_have_two_states():
    keys = {StatisticalPruning(Recipe(pattern=pattern)).state_key for pattern in ("2:4", "50%")}
    assert len(keys) == 2


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


def test_a_module_says_how_its_batches_become_inputs():
    class Odd(Classifier):
        def forward(self, x, scale):
            return super().forward(x * scale)

        def calibration_inputs(self, batch):
            return {"x": batch[0], "scale": torch.tensor(2.0)}

    module = Odd()
    callback = StatisticalPruning(Recipe(pattern="50%"), dataloader=classifier_data())
    inputs = callback._calibration(trainer(), module, module)
    assert inputs[0]["scale"] == 2


def test_calibration_data_is_never_the_validation_data_by_itself():
    with pytest.raises(CalibrationError, match="calibration_dataloader"):
        trainer(StatisticalPruning()).validate(CausalLM(tiny_llama()), loader(), verbose=False)


def test_a_module_that_does_not_exist_is_named():
    with pytest.raises(CalibrationError, match=r"module='body'.*it has model"):
        trainer(StatisticalPruning(module="body", dataloader=loader())).validate(
            CausalLM(tiny_llama()), loader(), verbose=False
        )


def test_the_output_is_a_verified_model_folder_and_is_never_overwritten(tmp_path):
    output = tmp_path / "sparse"
    module = CausalLM(tiny_llama())
    trainer(StatisticalPruning(dataloader=loader(), output=str(output))).validate(module, loader(), verbose=False)
    assert verify(output)["sparsity"] == 0.5
    reloaded = load_model(str(output))
    assert all(torch.equal(weight, module.get_parameter(f"model.{name}")) for name, weight in reloaded.named_parameters())
    with pytest.raises(CheckpointError, match="exists"):
        trainer(StatisticalPruning(dataloader=loader(), output=str(output))).validate(module, loader(), verbose=False)


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
    cli = LightningCLI(CausalLM, TextData, save_config_callback=None)
    weights = dict(cli.model.named_parameters())
    assert (weights["model.model.layers.0.mlp.up_proj.weight"] == 0).float().mean() == 0.5
    assert (weights["model.model.layers.0.mlp.down_proj.weight"] != 0).all()
    callback = next(one for one in cli.trainer.callbacks if isinstance(one, StatisticalPruning))
    assert callback.recipe.criterion["alpha"] == 0.25
    assert callback.then == "finetune"


DDP_SCRIPT = """
import sys
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from statprune import CausalLM, Recipe, StatisticalPruning
from statprune.training.modules import WindowDataset
sys.path.insert(0, sys.argv[1])
from test_callback import TOKENS, tiny_llama

torch.set_num_threads(1)
devices, output = int(sys.argv[2]), sys.argv[3]
module = CausalLM(tiny_llama())
# One window a batch: two ranks see half of the windows each, one rank sees all of them.
loader = DataLoader(WindowDataset(TOKENS), batch_size=4)
trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
                  enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, max_epochs=1,
                  callbacks=[StatisticalPruning(Recipe(pattern="2:4"))], num_sanity_val_steps=0)
module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
trainer.fit(module, loader, loader)
torch.save({"weights": dict(module.state_dict()), "metrics": trainer.callback_metrics}, f"{output}.{trainer.global_rank}")
"""


def test_two_ddp_ranks_prune_alike_and_as_one_process_with_all_the_data(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(DDP_SCRIPT))
    for devices in (1, 2):
        command = [sys.executable, script, __file__.rpartition("/")[0], str(devices), tmp_path / f"out{devices}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, rank0, rank1 = (torch.load(tmp_path / name, weights_only=True) for name in ("out1.0", "out2.0", "out2.1"))
    for name, weight in one["weights"].items():
        assert torch.equal(rank0["weights"][name], rank1["weights"][name]), name
        assert torch.allclose(rank0["weights"][name], weight, atol=1e-6), name
        assert torch.equal(rank0["weights"][name] == 0, weight == 0), name
    for name in ("dense_perplexity", "pruned_perplexity", "pruned_output_error", "pruned_sparsity"):
        assert rank0["metrics"][name] == pytest.approx(one["metrics"][name].item(), rel=1e-5), name
