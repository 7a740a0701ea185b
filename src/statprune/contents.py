"""What a folder of an output holds: weights and configuration, what lies beside the model, pages for people, the record."""

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from statprune import card
from statprune.companions import copy_companions, source_folder
from statprune.disk.finding import Saved
from statprune.errors import CheckpointError
from statprune.model.kinds import is_transformers_model
from statprune.page import PAGE, render_folder
from statprune.record import FORMAT, file_digest, write_record
from statprune.verification import names

PAGES: dict[str, Callable[[dict[str, Any], Path], str]] = {
    "README.md": lambda record, _: card.render(record),
    PAGE: render_folder,
}
"""What people read, by file name: each is made from the weights in the folder and from the record, before that has the digests
(`files`, `digest`) and with what it says beyond the report: `protocol`, `base`."""

USUAL_SHARD_SIZE = "50GB"
"""That of transformers."""

_COMPILED = "_orig_mod."
"""What `torch.compile` of a part of a model puts into the names of its parameters."""


def write(
    inner: nn.Module,
    prefix: str,
    record: dict[str, Any],
    folder: Path,
    tokenizer: Any,
    source: str | Path | None,
    max_shard_size: int | str | None,
) -> None:
    """All of it, for a model in memory.

    Args:
        inner: the model, without wrappers.
        prefix: what its parameters' names begin with in the record.
        record: of the run.
        folder: empty.
        tokenizer: to be saved, too.
        source: folder or hub name that the model came from.
        max_shard_size: of one file of weights.
    """
    write_weights(inner, folder, max_shard_size)
    with Saved(folder) as saved:

        def place_of(parameter: str, own: str) -> dict[str, Any]:
            weight = inner.get_parameter(parameter)
            try:
                file, tensor = saved.find(own, weight)
            except CheckpointError:
                if weight.ndim != 3:
                    raise
                return {"parts": saved.find_parts(own, weight)}
            return {"file": file, "tensor": tensor}

        complete(inner, prefix, record, folder, tokenizer, source, place_of)


def complete(
    inner: nn.Module,
    prefix: str,
    record: dict[str, Any],
    folder: Path,
    tokenizer: Any,
    source: str | Path | None,
    place_of: Callable[[str, str], Mapping[str, Any]],
) -> None:
    """Everything beside the weights and the configuration, the record last.

    Args:
        place_of: what the record says of where a parameter lies (`file` and `tensor`, or `parts`), from its name in `inner` and
            that without what `torch.compile` put in.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    beside = source_folder(source, getattr(getattr(inner, "config", None), "_commit_hash", None))
    if beside is not None:
        copy_companions(beside, folder, with_tokenizer=tokenizer is None)
    record = {"format": FORMAT, **record, "base": card.base_of(inner, source, beside)}
    for site in record["sites"]:
        parameter = site["parameter"].removeprefix(prefix)
        for key in ("name", "parameter"):
            site[key] = site[key].removeprefix(prefix).replace(_COMPILED, "")
        site |= place_of(parameter, site["parameter"])
    for name, render in PAGES.items():
        (folder / name).write_text(render(record, folder), encoding="utf-8")
    write_record(folder, {**record, "files": {name: file_digest(folder / name) for name in names(folder)}})


def write_configuration(model: nn.Module, folder: Path) -> None:
    """What `save_pretrained` of transformers writes beside the weights; no weight is looked at."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, _no_bars():
        model.save_pretrained(scratch, state_dict={})  # type: ignore[operator]
        for file in sorted(Path(scratch).iterdir()):
            if file.suffix == ".json" and not file.name.endswith(".index.json"):
                shutil.copy(file, folder / file.name)


def write_weights(inner: nn.Module, folder: Path, max_shard_size: int | str | None) -> None:
    """The weights, and for a transformers model its configuration."""
    from huggingface_hub import save_torch_state_dict

    size = USUAL_SHARD_SIZE if max_shard_size is None else max_shard_size
    state = {name.replace(_COMPILED, ""): value for name, value in inner.state_dict().items()}
    if not is_transformers_model(inner):
        save_torch_state_dict(state, folder, max_shard_size=size)
        return
    is_compiled_in_part = state.keys() != inner.state_dict().keys()
    with _no_bars():
        inner.save_pretrained(  # type: ignore[operator]
            folder, max_shard_size=size, **({"state_dict": state} if is_compiled_in_part else {})
        )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bar of the files that it writes; the hub's bars are as they were."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    was_shown, were_disabled = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that an environment variable has switched the hub's off
                logging.enable_progress_bar()
        if were_disabled:
            disable_progress_bars()
