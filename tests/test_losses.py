"""The training step of a LightningModule as the loss of a loss-aware method."""

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from statprune import StatisticalPruning
from statprune.errors import CalibrationError
from statprune.model import gradients
from tiny_models import classifier


class Classifier(LightningModule):
    """No language model, and nothing but its training step knows its loss."""

    def __init__(self, returns="dict"):
        super().__init__()
        self.model, self.returns, self.logged = classifier(), returns, []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self(x), y, reduction="sum")
        self.log("train_loss", loss)
        return {"dict": {"loss": loss}, "loss": loss, "nothing": None}[self.returns]

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(12, 8, generator=generator), torch.randint(0, 3, (12,), generator=generator)), batch_size=4
    )


def validate(module, tmp_path):
    pruning = StatisticalPruning("optimal-brain+loss-aware:steps=3", pattern="2:4", calibration=loader())
    trainer = Trainer(
        accelerator="cpu", callbacks=[pruning], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(module, loader(), verbose=False)
    return pruning, trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("returns", ["dict", "loss"])
def test_any_lightning_module_is_pruned_by_the_loss_of_its_training_step(returns, tmp_path, monkeypatch):
    module, found = Classifier(returns), []
    first = module.model[0]
    expected = torch.zeros(12, 12)
    for x, y in loader():
        hidden = first(x).detach().requires_grad_()
        cross_entropy(module.model[1:](hidden), y, reduction="sum").backward()
        expected += hidden.grad.t() @ hidden.grad
    module.zero_grad()

    def kept(*args, **kwargs):
        found.append(gradients.output_grams(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr("statprune.engine.output_grams", kept)
    pruning, trainer = validate(module, tmp_path)
    assert pruning.report.sparsity == 0.5
    torch.testing.assert_close(found[0].sums["model.0.weight"], expected)
    assert "train_loss" not in trainer.callback_metrics
    assert "log" not in vars(module)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_training_step_without_a_loss_is_refused(tmp_path):
    module = Classifier("nothing")
    before = nn.utils.parameters_to_vector(module.parameters()).clone()
    with pytest.raises(CalibrationError, match=r"Classifier.training_step gives NoneType: expected a loss"):
        validate(module, tmp_path)
    assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), before)
