"""The AbsTopK SAE: k latents an example, of either sign."""

from hedgelab.saes.topk import KSparseSAE


class AbsTopKSAE(KSparseSAE):
    """Keep the k pre-activations of each example that are largest in size, with their sign (Zhu et al. 2025, arXiv 2510.00404).

    There is no ReLU: a latent that is -1 takes its direction away, so that one row can stand for both ends of a concept. A
    latent fires where its activation is not 0. Dead latents, the auxiliary loss and levels work as in TopK; so do metrics.
    """

    signed = True
