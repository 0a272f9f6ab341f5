"""How an SAE is spread over processes: what the trainer's strategy means for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import Tensor, nn

from hedgelab.errors import UserError
from hedgelab.kernels.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hedgelab.saes.base import SAE

LATENT_DIMENSION = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "log_threshold": 0}
"""The dimension along which each parameter is split; the others are on every process."""


class ShardedStrategy(ModelParallelStrategy):
    """Splits the latents of one SAE over processes, for SAEs too wide for one device; ``trainer.strategy: sharded``.

    The processes of a tensor-parallel group each hold some columns of the encoder and rows of the decoder and see the same
    batch; several groups split it. Checkpoints are single files unless told otherwise.

    Args:
        data_parallel_size: Groups over which batches are split; ``auto`` is the number of nodes.
        tensor_parallel_size: Processes over which latents are split; ``auto`` is the number of devices of a node.
        save_distributed_checkpoint: Let every process write its part of a checkpoint, which then is a folder.
        kwargs: Further arguments of Lightning's ModelParallelStrategy.
    """

    def __init__(
        self,
        data_parallel_size: str | int = "auto",
        tensor_parallel_size: str | int = "auto",
        save_distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **kwargs)  # type: ignore[arg-type]


StrategyRegistry.register("sharded", ShardedStrategy, description="latents split over processes", override=True)


def batch_ranks(trainer: L.Trainer) -> Ranks:
    """The ranks over which the trainer splits each batch.

    Raises:
        UserError: A strategy that SAEs do not train with.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return ALONE
    if isinstance(strategy, DDPStrategy):
        return Ranks.of(None) if strategy.world_size > 1 else ALONE
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        return Ranks.of(mesh.get_group()) if mesh.size() > 1 else ALONE
    raise UserError(f"trainer.strategy: SAEs train with auto, ddp or sharded, not with {type(strategy).__name__}")


def split_latents(sae: SAE, mesh: DeviceMesh) -> None:
    """Leave each process of a mesh its part of the latents; the parameters become DTensors.

    Raises:
        UserError: The latents cannot be split evenly.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    count, rank = mesh.size(), mesh.get_local_rank()
    if sae.d_sae % count:
        raise UserError(f"model.d_sae: {sae.d_sae} latents cannot be split evenly over {count} processes")
    for name, parameter in list(sae.named_parameters(recurse=False)):
        own, dim = parameter.detach(), LATENT_DIMENSION.get(name)
        placement: Replicate | Shard = Replicate() if dim is None else Shard(dim)
        if dim is not None:
            own = own.chunk(count, dim)[rank]
        # Sparse gradients come with the layout of a transposed [d_sae, d_in], so W_enc keeps it.
        own = own.t().contiguous().t() if name == "W_enc" else own.contiguous()
        spread = DTensor.from_local(own.clone().to(mesh.device_type), mesh, [placement], run_check=False)
        setattr(sae, name, nn.Parameter(spread, parameter.requires_grad))


def is_split(value: Tensor) -> bool:
    """Whether each process has a part of this tensor only."""
    return getattr(value, "device_mesh", None) is not None


def whole(value: Tensor) -> Tensor:
    """All of a tensor, whether it is split or not, without a gradient; to be called on all processes."""
    value = value.detach()
    return value.full_tensor() if is_split(value) else value  # type: ignore[attr-defined]


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Average the gradients of split parameters over the ranks among whom rows are split; DDP does it for others."""
    if ranks.size == 1:
        return
    for parameter in parameters:
        if is_split(parameter) and parameter.grad is not None:
            own = parameter.grad.to_local()  # type: ignore[attr-defined]
            own.copy_(ranks.mean(own))
