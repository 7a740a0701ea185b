"""Prune a model, train on with the mask held, and measure what comes back, beside the dense model trained on in the same way.

    python configs/finetune.py --model MODEL --train TRAINING.txt --validation HELD-OUT.txt --pattern 2:4

Prints the perplexity on the validation text: dense, pruned, and both after so many steps.
"""

from typing import Any

import torch
from jsonargparse import CLI
from lightning import Callback, Trainer, seed_everything

from statprune import CausalLM, Recipe, StatisticalPruning, TextData


def main(
    model: str,
    train: list[str],
    validation: list[str],
    pattern: str = "2:4",
    method: str = "cvr+least-squares",
    schedule: str = "block",
    steps: int = 100,
    learning_rate: float = 1e-4,
    seqlen: int = 512,
    batch_size: int = 4,
    calibration_samples: int = 24,
    validation_batches: int = 10,
    seed: int = 0,
    output: str | None = None,
) -> None:
    """Measure, prune, train, measure.

    Args:
        model: Folder or hub name of the model.
        train: Text files to calibrate on and to train on.
        validation: Other text files.
        pattern: As for `statprune prune`.
        method: As for `statprune prune`.
        schedule: As for `statprune prune`.
        steps: Of training.
        learning_rate: The highest, after a warm-up over a tenth of the steps.
        seqlen: Tokens in a window.
        batch_size: Windows in a batch.
        calibration_samples: Calibration windows.
        validation_batches: How many batches of the validation text are measured.
        seed: Of the windows.
        output: Folder for the sparse model, fine-tuned. Default: it is not kept.
    """

    def run(callbacks: list[Callback], steps: int) -> tuple[CausalLM, float]:
        """The perplexity of the dense model, or of what the callback made of it, after so many steps."""
        seed_everything(seed, verbose=False)
        module = CausalLM(model, learning_rate=learning_rate, weight_decay=0.0).train()
        data = TextData(
            model, train=train, validation=validation, seqlen=seqlen, batch_size=batch_size,
            train_samples=batch_size * max(1, steps), calibration_samples=calibration_samples, seed=seed,
        )  # fmt: skip
        settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = Trainer(
            max_steps=steps, limit_val_batches=validation_batches, num_sanity_val_steps=0, gradient_clip_val=1.0,
            callbacks=callbacks, **settings,
        )  # fmt: skip
        if steps:
            trainer.fit(module, datamodule=data)
        measured = Trainer(limit_val_batches=validation_batches, callbacks=[] if steps else callbacks, **settings).validate(
            module, datamodule=data, verbose=False
        )
        return module, float(measured[0]["val_perplexity"])

    def pruning(**others: Any) -> StatisticalPruning:
        return StatisticalPruning(Recipe(method, pattern, schedule), module="model", **others)

    _, dense = run([], 0)
    _, pruned = run([pruning()], 0)
    _, dense_tuned = run([], steps)
    module, tuned = run([pruning(then="finetune", output=output)], steps)
    zeros = {name: int((weight == 0).sum()) for name, weight in module.model.named_parameters() if weight.ndim == 2}
    print(f"{method} at {pattern}, {steps} steps of {batch_size} x {seqlen} tokens, torch {torch.__version__}")
    print(f"dense   {dense:.3f}, trained on {dense_tuned:.3f}")
    print(f"pruned  {pruned:.3f}, trained on {tuned:.3f}; zeros now: {sum(zeros.values()):,}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
