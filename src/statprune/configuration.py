"""What a model is, by the files that lie beside its weights: its folder, its configuration and its class. No code of it runs.

transformers would run code in three ways, all of which are refused here: classes of the model's own (`auto_map`), classes of
transformers that are no models (`architectures`), and attention kernels from the hub (`attn_implementation`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from statprune.errors import ModelError, first_line, nearest
from statprune.weight_files import INDEX, WHOLE, read_index, read_json

ADAPTER = "adapter_config.json"
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_SWITCHES = ("output_hidden_states", "output_attentions", "return_dict", "use_cache")
"""What `forward` returns, which transformers does not check until it runs."""

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_OWN_CODE = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""Implementations of attention and of experts that are in torch and transformers themselves."""


def model_folder(path: str, revision: str | None = None, *, with_weights: bool = False) -> Path:
    """The folder that a model's files lie in: the one that was named, or that of the hub's cache, downloaded where need be.

    Args:
        path: folder or hub name.
        revision: branch, tag or commit on the hub; None for the main branch.
        with_weights: whether the weights are needed too.

    Raises:
        ModelError: there is neither; or a revision of a folder.
    """
    try:
        is_here = Path(path).exists()
    except (OSError, ValueError) as e:  # a ValueError where the name holds a NUL
        raise ModelError(f"No model at {path!r}: {first_line(e)}") from e
    if is_here:
        if revision is not None:
            raise ModelError(f"--revision {revision}: {path} is a folder, and only models of the hub have revisions.")
        return Path(path)
    from huggingface_hub import constants, snapshot_download

    # Offline by itself it would look for a commit's list of files on the hub.
    settings: dict[str, Any] = {
        "revision": revision, "ignore_patterns": ["*/*"], "local_files_only": bool(constants.HF_HUB_OFFLINE)
    }  # fmt: skip
    try:
        weights = [WHOLE, INDEX] if with_weights else []
        folder = Path(snapshot_download(path, allow_patterns=[*_SMALL_FILES, *weights], **settings))
        if with_weights and not (folder / WHOLE).is_file() and (folder / INDEX).is_file():
            shards = sorted(set(read_index(folder / INDEX).values()))
            settings["revision"] = folder.name  # the commit, whatever is pushed meanwhile
            folder = Path(snapshot_download(path, allow_patterns=shards, **settings))
    except (OSError, ValueError) as e:
        if isinstance(e, ModelError):
            raise
        of = f" (revision {revision})" if revision is not None else ""
        raise ModelError(f"No model at {path!r}{of}, neither a folder nor a name on the hub: {first_line(e)}") from e
    return folder


def load_config(path: str, revision: str | None = None) -> Any:
    """A model's configuration; its `_commit_hash` is the commit of a model of the hub.

    Args:
        path: folder or hub name.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: the folder is no model, or holds an adapter too; config.json is broken, or asks for code that came with
            the model or for a model type that transformers does not know; the model is quantized.
    """
    folder = model_folder(path, revision)
    _refuse_adapter(path, folder)
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{path} is not a model folder: expected config.json and *.safetensors in it, as save_pretrained writes them."
        )
    stated = read_json(file)
    _refuse(path, file, stated)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # each configuration class checks its own settings, in its own way
        raise ModelError(f"{file} is no configuration of a {stated['model_type']} model: {first_line(e)}") from e
    for name in _IMPLEMENTATIONS:
        if getattr(config, f"_{name}", None) not in (None, *_OWN_CODE):
            setattr(config, f"_{name}", None)  # a kernel would be downloaded where its package is not installed
    config._commit_hash = None if folder == Path(path) else folder.name
    return config


def _refuse_adapter(path: str, folder: Path) -> None:
    if not (folder / ADAPTER).is_file():
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path} is an adapter ({ADAPTER}), not a model: name the model that it was trained on.")
    raise ModelError(
        f"{path} holds an adapter beside the model ({ADAPTER}), which transformers would put into it without a word. Move "
        "adapter_config.json and adapter_model.safetensors into a folder of their own, and merge them where you want them: "
        "'statprune merge MODEL ADAPTER' into a pruned model, peft's merge_and_unload into a dense one."
    )


def _refuse(path: str, file: Path, stated: dict[str, Any]) -> None:
    """What can be seen in config.json itself, before transformers makes anything of it."""
    from transformers import CONFIG_MAPPING

    kind = stated.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f'{file} has no "model_type": expected the name of an architecture, such as "llama".')
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f'{file} has the model_type "{kind}", which is none of transformers.'
            + (" It brings code of its own (auto_map), which is never run." if stated.get("auto_map") else "")
            + nearest(kind, CONFIG_MAPPING)
        )
    names = stated.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{file} has architectures {names!r}: expected a list of names, such as [LlamaForCausalLM].")
    for place, key, value in _settings(stated):
        if key in ("quantization_config", "compression_config") and value:
            raise ModelError(f"{path} is quantized: prune the model that it was made from, and quantize afterwards.")
        if key in _SWITCHES and value is not None and not isinstance(value, bool):
            raise ModelError(f"{file} has {place} {value!r}: expected true or false.")
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value.removeprefix("torch.") not in _DTYPES:
            raise ModelError(f"{file} has {place} {value!r}: expected one of {', '.join(_DTYPES[:-1])}.")
        if key.strip("_").removesuffix("_internal") in _IMPLEMENTATIONS and "/" in str(value):
            raise ModelError(f"{file} asks for code from the hub, which is never run: {place} {value!r}. Remove it.")


def _settings(stated: dict[str, Any], above: str = "") -> Iterator[tuple[str, str, Any]]:
    """(where it stands, key, value) of a configuration, and of the configurations of parts of the model inside it."""
    for key, value in stated.items():
        yield f"{above}{key}", key, value
        if isinstance(value, dict) and key.endswith("_config"):
            yield from _settings(value, f"{above}{key}.")


def model_class(config: Any) -> tuple[Any, Any]:
    """(the transformers class that a configuration names, or else the one for causal language models; its configuration).

    The configuration is the same, or the part of it that the class takes: that of the text model.

    Raises:
        ModelError: a name that is no model class of transformers, or one of another architecture; or no name, and no causal
            language model of this type.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    kind = config.model_type
    names = config.architectures or []
    found = None
    for name in names:
        if hasattr(transformers, name):
            found = getattr(transformers, name)
            if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
                raise ModelError(f"architectures [{name}] in config.json: this is no model class of transformers.")
            break
    if found is None:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            named = f"architectures [{', '.join(names)}] in config.json: transformers knows" if names else "config.json names"
            raise ModelError(
                f"{named} no such class, and no causal language model of the type {kind}. Code that came with a model is never "
                "run: in Python, pass a model that you have built yourself to statprune.prune."
            )
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        found = found[0] if isinstance(found, list | tuple) else found
    for candidate in (config, config.get_text_config()):
        if found.config_class is not None and isinstance(candidate, found.config_class):
            return found, candidate
    raise ModelError(
        f"architectures [{found.__name__}] in config.json is a class for another model_type than {kind}"
        + (f", for {found.config_class.model_type}" if found.config_class is not None else "")
        + ". Which of the two is right?"
    )


def empty_model(path: str, dtype: torch.dtype | str = "auto", revision: str | None = None, *, config: Any = None) -> Any:
    """A model without its weights (on the meta device), for which a configuration is enough.

    Args:
        path: folder or hub name.
        dtype: a torch dtype; `"auto"` takes that of the configuration.
        revision: branch, tag or commit on the hub.
        config: its configuration, where it was loaded already.

    Raises:
        ModelError: as `load_config` and `model_class`; or no model can be built with these settings.
    """
    config = config if config is not None else load_config(path, revision)
    kind, config = model_class(config)
    settings = {} if dtype == "auto" else {"dtype": dtype}
    try:
        with torch.device("meta"):
            return kind._from_config(config, **settings)
    except Exception as e:  # each model class fails in its own way on settings that do not go together
        raise ModelError(
            f"No {kind.__name__} can be built with the config.json of {path}: {type(e).__name__}: {first_line(e)}"
        ) from e
