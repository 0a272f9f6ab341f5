"""Sparse codes and their exact gradients: the only place that knows how latents lie in memory."""
