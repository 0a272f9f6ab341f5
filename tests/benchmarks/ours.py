"""hedgelab's training step, in a worker process."""

from importlib.metadata import version

import torch
from torch import Tensor
from worker import Step, Task, serve

from hedgelab.batch import Batch
from hedgelab.kernels.allocator import keep_large_blocks
from hedgelab.saes import SAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE
from hedgelab.training.trainee import Trainee


def make_sae(task: Task) -> SAE:
    """The SAE of a task."""
    shape = {"d_in": task.d_in, "d_sae": task.d_sae}
    match task.sae:
        case "vanilla":
            return VanillaSAE(**shape, l1_coefficient=task.sparsity_coefficient)
        case "topk":
            return TopKSAE(**shape, k=task.k)
        case "batch_topk":
            return BatchTopKSAE(**shape, k=task.k)
        case "jumprelu":
            return JumpReLUSAE(**shape, l0_coefficient=task.sparsity_coefficient)
        case "matryoshka":
            return MatryoshkaSAE(task.d_in, lambda d_in: BatchTopKSAE(d_in, task.d_sae, k=task.k), levels=task.levels)
    raise ValueError(task.sae)


def build(task: Task) -> Step:
    """Loss, backward pass, fused Adam and the dead-latent clock, as training takes them."""
    keep_large_blocks()
    sae = make_sae(task).to(task.device)
    with torch.no_grad():
        sae.W_dec.copy_(task.initial_rows())
        sae.W_enc.copy_(sae.W_dec.t())
    sae.gradient_clip_norm = task.clip_norm
    sae.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=task.lr, fused=True)
    optimizer = sae.configure_optimizers()

    def take(x: Tensor) -> None:
        sae.zero_grad()
        result = sae.loss(Batch(x))
        result.total.backward()
        Trainee(sae).prepare_gradients()
        optimizer.step()
        sae.after_step(result)
        sae.steps_done += 1

    versions = {"hedgelab": version("hedgelab"), "torch": torch.__version__}
    return Step(take, lambda x: sae.loss(Batch(x)).error + x, versions)


if __name__ == "__main__":
    serve(build)
