"""Other libraries' training steps, in a worker process of their own environment; hedgelab is not imported."""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor
from worker import Step, Task, serve


def saelens(task: Task) -> Step:
    """``SAETrainer.step``; its gradients are clipped at norm 1, as always there."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes import jumprelu_sae, matryoshka_batchtopk_sae, standard_sae
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    common = {"d_in": task.d_in, "d_sae": task.d_sae, "device": task.device}
    sparse = {**common, "k": task.k, "rescale_acts_by_decoder_norm": False}
    match task.sae:
        case "vanilla":
            config = standard_sae.StandardTrainingSAEConfig(**common, l1_coefficient=task.sparsity_coefficient)
            sae = standard_sae.StandardTrainingSAE(config)
        case "topk":
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sparse))
        case "batch_topk":
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sparse))
        case "jumprelu":
            config = jumprelu_sae.JumpReLUTrainingSAEConfig(**common, l0_coefficient=task.sparsity_coefficient)
            sae = jumprelu_sae.JumpReLUTrainingSAE(config)
        case "matryoshka":
            module = matryoshka_batchtopk_sae
            config = module.MatryoshkaBatchTopKTrainingSAEConfig(**sparse, matryoshka_widths=task.levels)
            sae = module.MatryoshkaBatchTopKTrainingSAE(config)
        case _:
            raise ValueError(task.sae)
    with torch.no_grad():
        sae.W_dec.copy_(task.initial_rows())
        sae.W_enc.copy_(sae.W_dec.t())
    settings = SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=task.lr,
        lr_end=task.lr,
        device=task.device,
        autocast=task.autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(settings, sae, data_provider=iter(()))

    def take(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def reconstruct(x: Tensor) -> Tensor:
        inputs = sae_lens.saes.sae.TrainStepInput(
            sae_in=x, dead_neuron_mask=None, coefficients=trainer.get_coefficients(), n_training_steps=0, is_logging_step=False
        )
        return sae.training_forward_pass(inputs).sae_out

    return Step(take, reconstruct, {"sae-lens": version("sae-lens"), "torch": torch.__version__})


def dictionary_learning(task: Task) -> Step:
    """``Trainer.update``; it clips gradients at norm 1 and keeps decoder rows at norm 1, as always there."""
    nnsight = ModuleType("nnsight")  # its activation buffer's, which no training step touches
    nnsight.LanguageModel = nnsight.save = object
    sys.modules.setdefault("nnsight", nnsight)
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    common = {
        "steps": task.steps,
        "activation_dim": task.d_in,
        "dict_size": task.d_sae,
        "layer": 0,
        "lm_name": "-",
        "lr": task.lr,
        "warmup_steps": 0,
        "device": task.device,
        "seed": 0,
    }
    match task.sae:
        case "vanilla":
            trainer = StandardTrainerAprilUpdate(**common, l1_penalty=task.sparsity_coefficient, sparsity_warmup_steps=None)
        case "topk":
            trainer = TopKTrainer(**common, k=task.k)
        case "batch_topk":
            trainer = BatchTopKTrainer(**common, k=task.k)
        case "jumprelu":
            trainer = JumpReluTrainer(
                **common, bandwidth=0.05, sparsity_penalty=task.sparsity_coefficient, sparsity_warmup_steps=None
            )
        case "matryoshka":
            sizes = [b - a for a, b in zip([0, *task.levels], task.levels, strict=False)]
            trainer = MatryoshkaBatchTopKTrainer(
                **common, k=task.k, group_fractions=[size / task.d_sae for size in sizes], group_weights=[1.0] * len(sizes)
            )
        case _:
            raise ValueError(task.sae)
    rows = task.initial_rows().to(task.device)
    with torch.no_grad():
        if hasattr(trainer.ae, "encoder"):
            trainer.ae.encoder.weight.copy_(rows)
            trainer.ae.encoder.bias.zero_()
            trainer.ae.decoder.weight.copy_(rows.t())
        else:
            trainer.ae.W_enc.copy_(rows.t())
            trainer.ae.W_dec.copy_(rows)
    taken = 0

    def take(x: Tensor) -> None:
        nonlocal taken
        trainer.update(taken, x)
        taken += 1

    def reconstruct(x: Tensor) -> Tensor:
        if task.sae in ("vanilla", "jumprelu"):
            return trainer.ae(x)
        return trainer.ae.decode(trainer.ae.encode(x, use_threshold=False))

    return Step(take, reconstruct, {"dictionary-learning": version("dictionary-learning"), "torch": torch.__version__})


def sparsify(task: Task) -> Step:
    """``SparseCoder(x).fvu.backward()`` and Adam, unit decoder rows kept as its trainer keeps them; TopK only."""
    if task.sae != "topk":
        raise ValueError(f"sparsify has no {task.sae} SAE")
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k), device=task.device)
    with torch.no_grad():
        coder.W_dec.copy_(task.initial_rows())
        coder.encoder.weight.copy_(coder.W_dec)
    optimizer = torch.optim.Adam(coder.parameters(), lr=task.lr, fused=True)

    def take(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return Step(take, lambda x: coder(x).sae_out, {"sparsify": version("eai-sparsify"), "torch": torch.__version__})


PEERS = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}

if __name__ == "__main__":
    serve(lambda task: PEERS[task.library](task))
