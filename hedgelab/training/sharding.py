"""How an SAE is spread over processes: what the trainer's strategy means for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer

from hedgelab.errors import UserError
from hedgelab.kernels.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BY_LATENT = ("W_enc_rows", "b_enc", "W_dec", "log_threshold")
"""Parameters whose first dimension is split; the others are on every process."""


class ShardedStrategy(ModelParallelStrategy):
    """Splits the latents of one SAE over processes, for SAEs too wide for one device; ``trainer.strategy: sharded``.

    The processes of a tensor-parallel group each hold some columns of the encoder and rows of the decoder and see the same
    batch; several groups split it. Checkpoints are those of one process: a run can go on from one on any number of them.

    Args:
        data_parallel_size: Groups over which batches are split; ``auto`` is the number of nodes.
        tensor_parallel_size: Processes over which latents are split; ``auto`` is the number of devices of a node.
        save_distributed_checkpoint: Must be false; it is there because Lightning's default is not.
        kwargs: Further arguments of Lightning's ModelParallelStrategy.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        """Connect the processes.

        Raises:
            UserError: There are not as many as the sizes say, or checkpoints in parts are asked for.
        """
        count = self.num_nodes * self.num_processes
        groups = self.num_nodes if self._data_parallel_size == "auto" else int(self._data_parallel_size)
        parts = self.num_processes if self._tensor_parallel_size == "auto" else int(self._tensor_parallel_size)
        if groups * parts != count:
            raise UserError(
                f"trainer.strategy: data_parallel_size {groups} times tensor_parallel_size {parts} must be the number of "
                f"processes, trainer.num_nodes times trainer.devices: {count}"
            )
        if self._save_distributed_checkpoint:
            # PyTorch's format for them is read by unpickling, which executes whatever a file from elsewhere says.
            raise UserError(
                "trainer.strategy: checkpoints of an SAE are single files; remove save_distributed_checkpoint"
            )
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Before: what happens when a fit starts depends on whether it goes on from a checkpoint."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the optimisers' states, as with one process."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as one process does; every process reads it."""
        path = self.broadcast(checkpoint_path)
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of the weights."""
        assert self.lightning_module is not None
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {name: part_of(value, own[name]) if name in own else value for name, value in given.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimiser as of one process (see :func:`exchange_full_states`); to be called on all processes."""
        return (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Let every optimiser go on from its state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)


StrategyRegistry.register("sharded", ShardedStrategy, description="latents split over processes", override=True)
for _name, _start in (("ddp", "popen"), ("ddp_fork", "fork")):  # gradients stay where they were averaged
    _options = {"start_method": _start, "gradient_as_bucket_view": True}
    StrategyRegistry.register(_name, DDPStrategy, description="batches split over processes", override=True, **_options)


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
    if isinstance(strategy, ShardedStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        return Ranks.of(mesh.get_group()) if mesh.size() > 1 else ALONE
    raise UserError(f"trainer.strategy: SAEs train with auto, ddp or sharded, not with {type(strategy).__name__}")


def split_latents(sae: Any, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Leave each process of a mesh its part of the latents; the parameters become DTensors. Returned is what they were.

    Raises:
        UserError: The latents cannot be split evenly.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    import hedgelab.kernels.sharded  # noqa: F401  (plugs in kernels for such parameters)

    count, rank = mesh.size(), mesh.get_local_rank()
    if sae.d_sae % count:
        raise UserError(f"model.d_sae: {sae.d_sae} latents cannot be split evenly over {count} processes")
    before = {name: parameter.detach() for name, parameter in sae.named_parameters(recurse=False)}
    for name, parameter in list(sae.named_parameters(recurse=False)):
        own = parameter.detach().chunk(count)[rank] if name in BY_LATENT else parameter.detach()
        placement: Replicate | Shard = Shard(0) if name in BY_LATENT else Replicate()
        part = DTensor.from_local(own.clone().to(mesh.device_type), mesh, [placement], run_check=False)
        setattr(sae, name, nn.Parameter(part, parameter.requires_grad))
    return before


@contextmanager
def as_before_split(parts: Sequence[tuple[Any, dict[str, Tensor]]]) -> Iterator[None]:
    """Let SAEs have the whole parameters that :func:`split_latents` returned; what becomes of them is split again."""
    split = [{name: getattr(sae, name) for name in before} for sae, before in parts]
    for sae, before in parts:
        for name, value in before.items():
            setattr(sae, name, nn.Parameter(value))
    try:
        yield
    finally:
        for (sae, before), parameters in zip(parts, split, strict=True):
            for name, parameter in parameters.items():
                with torch.no_grad():
                    parameter.copy_(part_of(before[name], parameter))
                setattr(sae, name, parameter)


def is_split(value: Tensor) -> bool:
    """Whether each process has a part of this tensor only."""
    return getattr(value, "device_mesh", None) is not None


def full_tensor(value: Tensor) -> Tensor:
    """All of a tensor, whether it is split or not, without a gradient; to be called on all processes."""
    value = value.detach()
    return value.full_tensor() if is_split(value) else value  # type: ignore[attr-defined]


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, as a DTensor that is split like another; itself if that other is not split."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    mesh, (placement,) = like.device_mesh, like.placements
    own = value.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()] if isinstance(placement, Shard) else value
    own = own.clone()  # a view would keep all of it
    return DTensor.from_local(own.to(mesh.device_type), mesh, [placement], run_check=False)


def exchange_full_states(optimizer: Optimizer) -> Optimizer:
    """Make an optimiser of split parameters save and load its states as one process would.

    Its ``state_dict`` must then be called on all processes; the process of rank 0 alone gets tensors that were split.
    """

    def gather(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        first = torch.distributed.get_rank() == 0

        def gathered(value: Any) -> Any:
            if not isinstance(value, Tensor) or not is_split(value):
                return value
            full = full_tensor(value)  # on all processes
            return full.cpu() if first else full.new_empty(0)

        states = {key: {name: gathered(v) for name, v in values.items()} for key, values in state["state"].items()}
        return {**state, "state": states}

    def split(own: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in own.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        like = dict(zip(numbers, parameters, strict=False))  # the optimiser complains if they are not as many
        states = {
            key: {name: part_of(v, like[key]) if isinstance(v, Tensor) else v for name, v in values.items()}
            for key, values in state["state"].items()
            if key in like
        }
        return {**state, "state": states}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(split)
    return optimizer


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Average the gradients of split parameters over the ranks among whom rows are split; DDP does it for others."""
    if ranks.size == 1:
        return
    for parameter in parameters:
        if is_split(parameter) and parameter.grad is not None:
            own = parameter.grad.to_local()  # type: ignore[attr-defined]
            own.copy_(ranks.mean(own))
