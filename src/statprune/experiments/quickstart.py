"""The demonstration that needs nothing: train a small LLaMA on Python's own source, prune it, and compare methods.

Uses the package as its users would: a Lightning Trainer trains `CausalLM`, and the callback prunes it in `trainer.validate`.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from statprune.checkpoint import refuse_existing
from statprune.clock import timed
from statprune.data import standard_library_text
from statprune.errors import number_of
from statprune.experiments.compare import Cell
from statprune.progress import Progress, Say, silent, unsaid
from statprune.recipe import Recipe
from statprune.training.callback import StatisticalPruning
from statprune.training.modules import CausalLM, TextData

METHODS = ("magnitude", "wanda", "paper", "default")
"""The last is the one that is saved."""

PATTERNS = ("50%", "2:4")
VOCABULARY = 1024
SEQLEN = 128
BATCH_SIZE = 8
MAX_CHARACTERS = 4_000_000
"""Of training text: the training does not reach further, and tokenizing takes time."""


def quickstart(
    output: str | Path,
    *,
    steps: int = 400,
    seed: int = 0,
    progress: Progress = silent,
    say: Say = unsaid,
) -> list[Cell]:
    """Train, prune, compare; leave a dense and a sparse model and the texts in `output` for the other commands.

    Args:
        output: a folder that does not exist yet; gets `dense/`, `sparse/`, `texts/training.txt` and
            `texts/held-out.txt`.
        steps: of training; the default takes about a minute on two cores.
        seed: of the initial weights and of the windows.
        progress: called after each training step, and then after each cell.
        say: called with each step in words.

    Raises:
        CheckpointError: the output exists.
    """
    output = Path(output)
    refuse_existing(output)
    (output / "texts").mkdir(parents=True)
    training, held_out = standard_library_text(MAX_CHARACTERS)
    texts = {"training": training, "held-out": held_out[:200_000]}
    files = {name: output / "texts" / f"{name}.txt" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text, encoding="utf-8")
    megabytes = {name: f"{len(text) / 1e6:.1f} MB" for name, text in texts.items()}
    say(f"source text of Python's standard library: {megabytes['training']} to train on, {megabytes['held-out']} held out")
    tokenizer = train_tokenizer(training[:2_000_000], VOCABULARY)
    data = TextData(
        tokenizer,
        train=[str(files["training"])],
        validation=[str(files["held-out"])],
        seqlen=SEQLEN,
        batch_size=BATCH_SIZE,
        train_samples=BATCH_SIZE * steps,
        calibration_samples=64,
        seed=seed,
    )
    with isolate_rng(), _quiet_lightning(), _one_thread():
        torch.manual_seed(seed)
        module = CausalLM(_small_llama(tokenizer), learning_rate=5e-3)
        num_parameters = sum(parameter.numel() for parameter in module.parameters())
        say(
            f"training a LLaMA of {num_parameters / 1e6:.1f} M parameters for {number_of(steps, 'step')} with a Lightning "
            "Trainer"
        )
        trainer = _trainer(max_steps=steps, limit_val_batches=0, gradient_clip_val=1.0, callbacks=[_Steps(progress, steps)])
        trainer.fit(module, datamodule=data)
    module.model.save_pretrained(output / "dense")
    tokenizer.save_pretrained(output / "dense")

    trained = copy.deepcopy(module.state_dict())
    cells = [Cell("dense", "", float("nan"), 0.0, {})]
    for pattern in PATTERNS:
        for method in METHODS:
            module.load_state_dict(trained)
            recipe = Recipe(method, pattern)
            is_last = (pattern, method) == (PATTERNS[-1], METHODS[-1])
            pruning = StatisticalPruning(recipe, output=str(output / "sparse") if is_last else None)
            seconds: dict[str, float] = {}
            with _quiet_lightning(), _one_thread(), timed(seconds, "cell"):
                measured = _trainer(callbacks=[pruning]).validate(module, datamodule=data, verbose=False)[0]
            cells[0] = Cell("dense", "", measured["dense_perplexity"], 0.0, {})
            cells.append(Cell(method, pattern, measured["pruned_perplexity"], seconds["cell"], recipe.to_dict()))
            say(f"{method} at {pattern}: perplexity {cells[-1].perplexity:.2f} (dense {cells[0].perplexity:.2f})")
            progress(len(cells) - 1, len(PATTERNS) * len(METHODS), f"{method} at {pattern}")
    return cells


def train_tokenizer(text: str, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer: it can encode any text, and has no special token but the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _small_llama(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * SEQLEN,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain 5 % from a second thread, and lose a factor of ten where another process has its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's remarks about hardware, workers and its own future, which drown what the command has to say."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec")
        yield
    logger.setLevel(level)


class _Steps(Callback):
    """Tells how far the training is."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.progress(trainer.global_step, self.steps, "training steps")


def _trainer(**settings: Any) -> Trainer:
    """A Trainer that writes no files and leaves the terminal to us."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **settings,
    )
