"""Make the file that own_activations.yaml reads: 20 000 activations of 60 known features in 64 dimensions."""

import sys

import torch
from safetensors.torch import save_file

torch.manual_seed(0)
directions = torch.linalg.qr(torch.randn(64, 64))[0][:60].contiguous()
features = (torch.rand(20_000, 60) < 1 / 12).float()
path = sys.argv[1] if len(sys.argv) > 1 else "own.safetensors"
save_file({"x": features @ directions, "features": features, "feature_directions": directions}, path)
