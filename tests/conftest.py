import logging
import os
from pathlib import Path

# Before transformers and datasets are imported: no test talks to a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from exports import shared_trace
from two_ranks import TwoRanks

SHARED = Path(__file__).parents[2] / "shared"

# Two cores, perhaps shared with other tests: threads would only wait for each other on models this small.
torch.set_num_threads(1)

# What torch.export traces by the thousand lines would hide what a failed test has to say.
logging.getLogger("torch.__trace").addFilter(lambda *_: False)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_export_for_each_architecture(request, monkeypatch):
    if "real_export" not in request.keywords:
        monkeypatch.setattr("statprune.model.layers.trace", shared_trace)


def pytest_collection_modifyitems(items):
    # First, so that one worker of pytest-xdist gets them all, and one pair of processes will do.
    items.sort(key=lambda item: "two_ranks" not in item.fixturenames)


@pytest.fixture(scope="session")
def two_ranks():
    """`two_ranks(function, *arguments)` calls `function(rank, *arguments)` in two processes that share a gloo group."""
    pair = TwoRanks()
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def shared():
    """The trained model and the texts that stand beside the project, where there are any."""
    if not (SHARED / "models" / "pycode-llama" / "model.safetensors").is_file():
        pytest.skip("needs ../shared/models/pycode-llama and ../shared/data, which are not part of the project")
    return SHARED


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of at most 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["to be or not to be, that is the question\n"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_tokenizer):
    """A LLaMA of one layer with its tokenizer, saved as anyone would."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)
