"""Lightning modules for a causal language model and for text: enough to train, validate and prune one from a YAML file."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from statprune.data import Text, consecutive_windows, random_windows, tokenize
from statprune.loading import load_model, load_tokenizer
from statprune.perplexity import Perplexity


class CausalLM(LightningModule):
    """Any transformers causal language model, trained with AdamW and a linear warm-up and decay.

    Args:
        model: a `PreTrainedModel`, or the folder or hub name of one (safetensors only, no remote code).
        learning_rate: the highest, reached after the warm-up.
        warmup_fraction: of all steps.
        weight_decay: on matrices only.

    Logs `train_loss`, `val_loss` and `val_perplexity`.
    """

    def __init__(
        self, model: Any, learning_rate: float = 3e-4, warmup_fraction: float = 0.1, weight_decay: float = 0.1
    ) -> None:
        super().__init__()
        # Loaded models are in eval mode, and Lightning trains modules in the modes that they have.
        self.model = load_model(model, dtype=torch.float32).train() if isinstance(model, str) else model
        self.learning_rate, self.warmup_fraction, self.weight_decay = learning_rate, warmup_fraction, weight_decay
        self.val_perplexity = Perplexity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [batch, length, vocabulary]."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Next-token cross-entropy."""
        output = self.model(**batch, labels=batch["input_ids"], use_cache=False)
        self.log("train_loss", output.loss, prog_bar=True)
        loss: Tensor = output.loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Perplexity."""
        self.val_perplexity.update_next_token(self(**batch), batch["input_ids"], batch.get("attention_mask"))

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity over all windows."""
        perplexity = self.val_perplexity.compute().float()
        self.log("val_perplexity", perplexity, prog_bar=True, sync_dist=True)
        self.log("val_loss", perplexity.log(), sync_dist=True)
        self.val_perplexity.reset()

    def configure_optimizers(self) -> Any:
        """AdamW; vectors (norms, biases) do not decay."""
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.learning_rate,
            betas=(0.9, 0.95),
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = max(1, round(self.warmup_fraction * steps))

        def scale(step: int) -> float:
            return min((step + 1) / warmup, max(0.05, (steps - step) / max(1, steps - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TextData(LightningDataModule):
    """Token windows of text files: random ones to train on, consecutive ones to validate on, others to calibrate on.

    Args:
        tokenizer: a tokenizer, or the folder or hub name of one.
        train: text files to train on, and to calibrate on where `calibration` is empty.
        validation: text files to validate on.
        calibration: text files to calibrate on; keep them apart from `validation`, or the perplexity is flattered.
        seqlen: tokens in a window.
        batch_size: windows in a batch.
        train_samples: training windows in an epoch.
        calibration_samples: calibration windows.
        seed: of the random places.
    """

    def __init__(
        self,
        tokenizer: Any,
        train: Sequence[str] = (),
        validation: Sequence[str] = (),
        calibration: Sequence[str] = (),
        seqlen: int = 512,
        batch_size: int = 8,
        train_samples: int = 1024,
        calibration_samples: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.train, self.validation, self.calibration = list(train), list(validation), list(calibration)
        self.seqlen, self.batch_size, self.seed = seqlen, batch_size, seed
        self.train_samples, self.calibration_samples = train_samples, calibration_samples
        self._tokenized: dict[tuple[str, ...], Tensor] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Random windows, shuffled."""
        return self._loader(random_windows(self._tokens(self.train), self.train_samples, self.seqlen, self.seed), shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Consecutive windows."""
        return self._loader(consecutive_windows(self._tokens(self.validation), self.seqlen))

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Random windows; `StatisticalPruning` asks for them."""
        tokens = self._tokens(self.calibration or self.train)
        return self._loader(random_windows(tokens, self.calibration_samples, self.seqlen, self.seed + 1))

    def _tokens(self, files: Sequence[str]) -> Tensor:
        key = tuple(files)
        if key not in self._tokenized:
            self._tokenized[key] = tokenize(self.tokenizer, Text(files))
        return self._tokenized[key]

    def _loader(self, windows: Tensor, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(WindowDataset(windows), batch_size=self.batch_size, shuffle=shuffle)  # type: ignore[arg-type]


class WindowDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token windows [windows, length] as model inputs."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}
