"""What the training README says of number formats."""

import os
import subprocess
import sys

import pytest
import torch

ASK = "import hedgelab.saes, hedgelab.training.shell, torch; print(torch.get_float32_matmul_precision())"


@pytest.mark.slow
@pytest.mark.parametrize(("switch", "precision"), [("0", "highest"), ("1", "high")])
def test_products_are_in_tf32_where_pytorchs_switch_says_so(switch, precision):
    env = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": switch}
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == precision


@pytest.mark.parametrize(("dtype", "moves"), [(torch.bfloat16, False), (torch.float32, True)])
def test_adams_steps_are_rounded_away_in_weights_of_16_bits(dtype, moves):
    """Why ``bf16-true`` is refused."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    adam = torch.optim.Adam([weight], lr=1e-3)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        adam.step()
    assert bool((weight < 1).all()) == moves
