"""Models of a few hundred weights, and what several test files ask of them."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 48
TRANSFORMER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TRANSFORMER, "num_key_value_heads": 1, **settings})).eval()


def gpt2(**settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **settings})).eval()


def t5(**settings):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**{**sizes, "decoder_start_token_id": 0, **settings})).eval()


def classifier() -> nn.Sequential:
    """Three linear layers; the last one is the output layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, under all names they have."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters and buffers that are not bit for bit what they were."""
    return {name for name, tensor in snapshot(model).items() if not torch.equal(tensor.nan_to_num(), before[name].nan_to_num())}


@contextlib.contextmanager
def refused(model: nn.Module, error: type[Exception], match: str):
    """The call inside raises, and leaves the model as it was."""
    before, modes = snapshot(model), [module.training for module in model.modules()]
    attributes = set(vars(model))
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert changed(model, before) == set()
    assert [module.training for module in model.modules()] == modes
    assert set(vars(model)) == attributes
