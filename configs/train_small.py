"""Train a small model of another family than LLaMA, to see whether what holds on one model holds on a second.

    python configs/train_small.py --family qwen2 --output second-model
    python configs/train_small.py --family mixtral --steps 400 --output mixture

`qwen2`: 3.0 M parameters, with grouped-query attention (6 heads, 2 of keys and values), biases on q, k and v, and output
weights tied to the embeddings. `mixtral`: a mixture of 8 experts, of which each token sees 2.

They learn the source text of Python's standard library. Writes the model, `training.txt`, and `held-out.txt`: modules that were
not trained on. 1600 steps of the first take about 45 minutes on one core.
"""

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import CLI
from lightning import Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from statprune.checkpoint import refuse_existing
from statprune.data import standard_library_text
from statprune.experiments.quickstart import train_tokenizer
from statprune.training.modules import CausalLM, TextData

SIZES = {
    "qwen2": {"intermediate_size": 576, "num_hidden_layers": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mixtral": {
        "intermediate_size": 192, "num_hidden_layers": 4, "num_key_value_heads": 2, "num_local_experts": 8,
        "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.01,
    },
}  # fmt: skip


def main(
    output: str,
    family: Literal["qwen2", "mixtral"] = "qwen2",
    steps: int = 1600,
    batch_size: int = 16,
    seqlen: int = 256,
    seed: int = 0,
) -> None:
    """Train, and save the model and its texts.

    Args:
        output: A folder that does not exist yet.
        family: Which model.
        steps: Of training, with `batch_size` windows of `seqlen` tokens each.
        batch_size: Windows in a step.
        seqlen: Tokens in a window.
        seed: Of the initial weights and of the windows.
    """
    refuse_existing(output)
    folder = Path(output)
    folder.mkdir(parents=True)
    training, held_out = standard_library_text()
    (folder / "training.txt").write_text(training, encoding="utf-8")
    (folder / "held-out.txt").write_text(held_out, encoding="utf-8")
    tokenizer = train_tokenizer(training[:4_000_000], 2048)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_attention_heads=6,
        max_position_embeddings=2 * seqlen,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **SIZES[family],
    )
    module = CausalLM(AutoModelForCausalLM.from_config(config), learning_rate=4e-3)
    data = TextData(
        tokenizer,
        train=[str(folder / "training.txt")],
        seqlen=seqlen,
        batch_size=batch_size,
        train_samples=batch_size * steps,
        seed=seed,
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, datamodule=data)
    if SIZES[family].get("output_router_logits"):  # only the balance of the experts in the training loss needs them
        module.model.config.output_router_logits = False
    module.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    CLI(main, as_positional=False)
