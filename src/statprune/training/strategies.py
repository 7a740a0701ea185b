"""Which of Lightning's strategies a model can be pruned under, and how FSDP2 has to be put around it."""

from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from statprune.errors import SiteError
from statprune.model.storage import is_fsdp


def refuse_strategy(strategy: Any) -> None:
    """Refuse a strategy that shards weights otherwise than FSDP2 does.

    Args:
        strategy: a Trainer's, whose environment is set up.

    Raises:
        SiteError: FSDP1, DeepSpeed, or tensor parallelism.
    """
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        kind = (
            "FSDP1, which flattens weights" if isinstance(strategy, FSDPStrategy) else "DeepSpeed, which may partition weights"
        )
        raise SiteError(
            f"StatisticalPruning under {type(strategy).__name__}: this is {kind}. Use ModelParallelStrategy, with "
            'torch.distributed.fsdp.fully_shard in `configure_model` (FSDP2), one device, or strategy="ddp".'
        )
    if isinstance(strategy, ModelParallelStrategy):
        data, tensor = (strategy.device_mesh[name].size() for name in ("data_parallel", "tensor_parallel"))
        if tensor > 1:
            raise SiteError(
                f"StatisticalPruning under ModelParallelStrategy with {data} data-parallel x {tensor} tensor-parallel ranks: "
                f"expected no tensor parallelism. Use ModelParallelStrategy(data_parallel_size={data * tensor}, "
                "tensor_parallel_size=1), with torch.distributed.fsdp.fully_shard in `configure_model`."
            )


def refuse_outer_shards(pl_module: LightningModule, target: nn.Module) -> None:
    """Refuse a module inside of one that FSDP2 shards: run by itself, its weights would not be gathered.

    Args:
        pl_module: the LightningModule, configured.
        target: the module in it that is pruned.

    Raises:
        SiteError: names the module around it.
    """
    for path, module in pl_module.named_modules():
        if is_fsdp(module) and module is not target and any(one is target for one in module.modules()):
            around = f"the module {path}" if path else f"the {type(pl_module).__name__} itself"
            raise SiteError(
                f"StatisticalPruning: fully_shard was called on {around}, around the {type(target).__name__} that is pruned, "
                "which does not run by itself any more. Call fully_shard on the latter last, and on nothing around it. Nothing "
                "was changed."
            )
