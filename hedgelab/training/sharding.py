"""How an SAE is spread over processes: what the trainer's strategy means for it."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch import strategies
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from hedgelab.errors import UserError
from hedgelab.kernels.ranks import ALONE, Ranks

BY_LATENT = ("W_enc_rows", "b_enc", "W_dec", "theta")  # their first dimension is split, others are not


class ShardedStrategy(strategies.ModelParallelStrategy):
    """Splits the latents of one SAE over processes, for SAEs too wide for one device; ``trainer.strategy: sharded``.

    The processes of a tensor-parallel group each hold some columns of the encoder and rows of the decoder and see the same
    batch; several groups split it. Checkpoints are those of one process: a run can go on from one on any number of them.

    Args:
        data_parallel_size: Groups over which batches are split; ``auto`` is the number of nodes.
        tensor_parallel_size: Processes over which latents are split; ``auto`` is the number of devices of a node.
        save_distributed_checkpoint: Must be false; it is there because Lightning's default is not.
        kwargs: Further arguments of Lightning's ModelParallelStrategy.
    """

    restore_checkpoint_after_setup = False  # what happens when a fit starts depends on whether it goes on from one
    lightning_restore_optimizer = True  # Lightning hands over the optimisers' states, as with one process
    load_optimizer_state_dict = strategies.Strategy.load_optimizer_state_dict
    optimizer_state = strategies.Strategy.optimizer_state  # to be called on all processes: see exchange_full_states

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        """Connect the processes, if they are as many as the sizes say."""
        count = self.num_nodes * self.num_processes
        groups = self.num_nodes if self._data_parallel_size == "auto" else int(self._data_parallel_size)
        parts = self.num_processes if self._tensor_parallel_size == "auto" else int(self._tensor_parallel_size)
        if groups * parts != count:
            sizes = f"data_parallel_size {groups} times tensor_parallel_size {parts}"
            raise UserError(f"trainer.strategy: {sizes} must be trainer.num_nodes times trainer.devices: {count}")
        if self._save_distributed_checkpoint:  # PyTorch reads its format for them by unpickling, which executes code
            raise UserError("trainer.strategy: checkpoints are single files; remove save_distributed_checkpoint")
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as one process does; every process reads it."""
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of the weights."""
        assert self.lightning_module is not None
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {name: part_of(value, own.get(name)) for name, value in given.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)


strategies.StrategyRegistry.register("sharded", ShardedStrategy, override=True)
for _name, _start in (("ddp", "popen"), ("ddp_fork", "fork")):  # gradients stay where they were averaged
    _options: dict[str, Any] = {"start_method": _start, "gradient_as_bucket_view": True}
    strategies.StrategyRegistry.register(_name, strategies.DDPStrategy, override=True, **_options)


def batch_ranks(trainer: L.Trainer) -> Ranks:
    """The ranks over which the trainer splits each batch; strategies that SAEs do not train with are refused."""
    strategy = trainer.strategy
    if isinstance(strategy, (strategies.SingleDeviceStrategy, strategies.DDPStrategy)):
        return Ranks.of(None) if trainer.world_size > 1 else ALONE
    if isinstance(strategy, ShardedStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        return Ranks.of(mesh.get_group()) if mesh.size() > 1 else ALONE
    raise UserError(f"trainer.strategy: SAEs train with auto, ddp or sharded, not with {type(strategy).__name__}")


def split_latents(sae: Any, mesh: Any) -> None:
    """Leave each process of a mesh its equal part of the latents; the parameters become DTensors."""
    from torch.distributed.tensor import Replicate, Shard

    import hedgelab.kernels.sharded  # noqa: F401  (plugs in kernels for such parameters)

    if sae.d_sae % mesh.size():
        raise UserError(f"model.d_sae: {sae.d_sae} latents cannot be split evenly over {mesh.size()} processes")
    for name, parameter in list(sae.named_parameters(recurse=False)):
        part = _own_part(parameter.detach(), mesh, Shard(0) if name in BY_LATENT else Replicate())
        setattr(sae, name, nn.Parameter(part, parameter.requires_grad))


def is_split(value: Any) -> bool:
    """Whether each process has a part of this tensor only."""
    return getattr(value, "device_mesh", None) is not None


def full_tensor(value: Tensor) -> Tensor:
    """All of a tensor, whether it is split or not, without a gradient; to be called on all processes."""
    value = value.detach()
    return value.full_tensor() if is_split(value) else value  # type: ignore[attr-defined]


def part_of(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, as a DTensor that is split like another; itself if that other is not split."""
    if not is_split(like) or is_split(value) or value.shape != like.shape:
        return value
    return _own_part(value, like.device_mesh, like.placements[0])


def _own_part(value: Tensor, mesh: Any, placement: Any) -> Tensor:
    """PyTorch's ``distribute_tensor`` would move all of it to the device first."""
    from torch.distributed.tensor import DTensor

    own = value.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()] if placement.is_shard() else value
    own = own.clone().to(mesh.device_type)  # a view would keep all of it
    return DTensor.from_local(own, mesh, [placement], run_check=False)


def exchange_full_states(optimizer: Optimizer) -> None:
    """Make an optimiser of split parameters save and load its states as one process would.

    Its ``state_dict`` must then be called on all processes; the process of rank 0 alone gets tensors that were split.
    """

    def gathered(value: Tensor) -> Tensor:
        if not is_split(value):
            return value
        full = full_tensor(value)  # on all processes
        return full.cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0)

    def split(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        pairs = zip(numbers, parameters, strict=False)  # the optimiser complains if they are not as many
        known = ((number, parameter) for number, parameter in pairs if number in state["state"])
        states = {n: apply_to_collection(state["state"][n], Tensor, part_of, like=own) for n, own in known}
        return {**state, "state": states}

    optimizer.register_state_dict_post_hook(
        lambda _, state: {**state, "state": apply_to_collection(state["state"], Tensor, gathered)}
    )
    optimizer.register_load_state_dict_pre_hook(split)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Average the gradients of split parameters over the ranks among whom rows are split; DDP does it for others."""
    for parameter in parameters if ranks.size > 1 else ():
        if is_split(parameter) and parameter.grad is not None:
            own = parameter.grad.to_local()  # type: ignore[attr-defined]
            own.copy_(ranks.mean(own))
