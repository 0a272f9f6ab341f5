"""What a GPU must show of hedgelab itself: training, measuring and whole commands.

With ``HEDGELAB_GPU_DRY_RUN=1`` the same tests walk through on the CPU, so that a GPU is never the first to run them.
"""

import json
import os
from pathlib import Path

import pytest
import torch

import hedgelab as hl
from hedgelab.cli import main
from hedgelab.data import toy
from hedgelab.training.captured import STEPS_BEFORE, SWITCH, StepGraph

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
DRY = bool(os.environ.get("HEDGELAB_GPU_DRY_RUN"))
DEVICE = torch.device("cpu" if DRY else "cuda")
ACCELERATOR = "cpu" if DRY else "gpu"
CONFIGS = Path(__file__).parents[2] / "configs"
D_IN, D_SAE = 32, 128 if DRY else 512
KINDS = {
    "vanilla": lambda: hl.VanillaSAE(D_IN, D_SAE, l1_coefficient=0.1),
    "topk": lambda: hl.TopKSAE(D_IN, D_SAE, k=4),
    "batch_topk": lambda: hl.BatchTopKSAE(D_IN, D_SAE, k=4),
    "jumprelu": lambda: hl.JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.1),
    "matryoshka": lambda: hl.MatryoshkaSAE(D_IN, lambda d_in: hl.BatchTopKSAE(d_in, D_SAE, k=4), levels=[16, 64, D_SAE]),
}


@pytest.fixture(autouse=True)
def _device_is_there():
    assert DRY or torch.cuda.is_available(), "the gpu marker asks for a CUDA device; HEDGELAB_GPU_DRY_RUN=1 does without"


def rows(count: int = 4096, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    firing = (torch.rand(count, 64, generator=generator) < 0.05).float()
    return firing @ torch.nn.functional.normalize(torch.randn(64, D_IN, generator=generator), dim=1)


def train(kind: str, device: torch.device, steps: int = 40, autocast: bool = False) -> tuple[hl.SAE, list[float]]:
    torch.manual_seed(0)
    sae = KINDS[kind]().to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    x, losses = rows().to(device), []
    for step in range(steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            terms = sae.loss(hl.Batch(x[(step % 4) * 1024 : (step % 4 + 1) * 1024]))
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(terms)
        losses.append(terms.total.item())
    return sae, losses


@pytest.mark.parametrize("kind", KINDS)
def test_trains_like_the_cpu(kind):
    _, expected = train(kind, torch.device("cpu"))
    _, losses = train(kind, DEVICE)
    assert losses == pytest.approx(expected, rel=2e-3)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_under_bf16_autocast(kind):
    _, expected = train(kind, torch.device("cpu"))
    sae, losses = train(kind, DEVICE, autocast=True)
    assert losses == pytest.approx(expected, rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in sae.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_trains_as_any_other(kind, autocast, monkeypatch):
    if DRY:
        pytest.skip("CUDA graphs need a GPU")
    found = []
    for switch in "01":
        monkeypatch.setenv(SWITCH, switch)
        torch.manual_seed(0)
        sae = KINDS[kind]().to(DEVICE)
        graph, optimizer = StepGraph(sae), torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
        x, losses, replays = rows().to(DEVICE), [], 0
        for step in range(60):
            optimizer.zero_grad()
            batch = hl.Batch(x[(step % 4) * 1024 : (step % 4 + 1) * 1024])
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                terms = graph.take(batch)
                replays += terms is not None
                if terms is None:
                    terms = sae.loss(batch)
                    terms.total.backward()
            optimizer.step()
            sae.after_step(terms)
            losses.append(terms.total.item())
        assert replays == (60 - STEPS_BEFORE if switch == "1" else 0)
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=2e-2 if autocast else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_measures_are_those_of_the_cpu(kind, tmp_path):
    sae, _ = train(kind, DEVICE)
    x, features = rows(2048 if DRY else 8192, seed=1).to(DEVICE), torch.eye(D_IN)
    found = [hl.hedging(sae, features.to(DEVICE)).norm, hl.residual_hedging(x, sae), hl.explained_variance(x, sae(x))]
    sae.save(tmp_path / "sae")
    copy = hl.load(tmp_path / "sae")
    expected = [
        hl.hedging(copy, features).norm,
        hl.residual_hedging(x.cpu(), copy),
        hl.explained_variance(x.cpu(), copy(x.cpu())),
    ]
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert torch.allclose(a.cpu().double(), b.double(), rtol=1e-2, atol=1e-3, equal_nan=True)


def flat(values) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in flat(value)]
    return [torch.as_tensor(values)] if isinstance(values, (int, float)) else []


def test_nccl_gives_one_process_its_own_numbers():
    if DRY:
        pytest.skip("NCCL needs a GPU")
    torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:29531", rank=0, world_size=1)
    try:
        value = torch.arange(4.0, device=DEVICE)
        torch.distributed.all_reduce(value)
        assert value.tolist() == [0, 1, 2, 3]
        _, losses = train("batch_topk", DEVICE, steps=4)
    finally:
        torch.distributed.destroy_process_group()
    assert losses == pytest.approx(train("batch_topk", DEVICE, steps=4)[1], rel=1e-6)


def run(*words: str) -> None:
    assert main([*words]) == 0


def test_commands_on_a_toy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(
        "fit",
        f"--config={CONFIGS}/toy/hierarchical.yaml",
        f"--trainer.accelerator={ACCELERATOR}",
        f"--trainer.max_steps={300 if DRY else 3000}",
    )
    run("runs", "--last")
    assert "hedging" in capsys.readouterr().out


def test_commands_on_a_language_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, model = make_language_model(tmp_path / "model")
    text = " ".join(words[(7 * i + i * i) % len(words)] for i in range(40_000))
    Path("text.txt").write_text(text)
    data = {
        "model": model, "layer": 1, "text": {"class_path": "TextFiles", "init_args": {"paths": ["text.txt"]}},
        "context_length": 32, "contexts_per_block": 64, "contexts_at_once": 32, "batch_size": 256, "val_batches": 2,
    }  # fmt: skip
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    tree = {
        "seed_everything": 0,
        "trainer": {"max_steps": 24, "accelerator": ACCELERATOR, "precision": "bf16-mixed", "log_every_n_steps": 8},
        "data": {"class_path": "LLMDataModule", "init_args": data},
        "model": {"class_path": "BatchTopKSAE", "init_args": {"d_sae": 256, "k": 8, "optimizer": optimizer}},
    }
    Path("fit.yaml").write_text(json.dumps(tree))
    run("fit", "--config=fit.yaml")
    tree["trainer"]["precision"] = "32-true"
    Path("hedge.yaml").write_text(json.dumps(tree | {"hedge": {"n_new": 16, "new_norm": 1.0, "seeds": 1}}))
    run("hedge", "--config=hedge.yaml")
    run("evaluate", "fit", "--suite=density,loss_recovered", "--rows=512", "--loss_contexts=8")


def make_language_model(folder: Path) -> tuple[list[str], str]:
    """A random Llama of 4 blocks, 128 wide, and its words."""
    transformers = pytest.importorskip("transformers", reason="needs hedgelab[llm]")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(252)]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return words, str(folder)


def test_batches_of_many_features_are_drawn_where_they_are_used():
    """Draws of the device have the rates, the activations and the exclusion of those of the CPU."""
    forest = toy.Forest(16, 4, 3, scale_children=True)
    law, factors = toy.Zipf(0.5, 0.4, 5e-4), toy.LowRankCorrelation(25, scale=0.1)
    options = {"batch_size": 65536, "magnitude_mean": 4.0, "magnitude_std": 1.0, "bias": 0.5, "seed": 0}
    sums = []
    for device in ("cpu", DEVICE.type):
        firing = toy.CopulaFiring(2048, law, factors, forest)
        batch = toy.ToyDataModule(firing, 64, device=device, **options).batch("train", 0)
        assert batch.x.device.type == device
        codes = batch.features.to("cpu")
        parents = firing.parents[codes.layout.latents]
        inside = parents >= 0
        families = codes.rows()[inside] * 2048 + parents[inside]
        assert len(families.unique()) == len(families)  # no two children of a parent fire together
        sums.append((codes.firing_counts().double(), codes.values.double().sum(), batch.x.cpu().double().mean(0)))
    (count, total, mean), (count_there, total_there, mean_there) = sums
    scores = (count - count_there) / (count + count_there).clamp_min(1).sqrt()
    assert scores.abs().max() < 6
    assert scores[count > 50].square().mean() < 1.2
    assert total_there == pytest.approx(total.item(), rel=0.02)
    torch.testing.assert_close(mean, mean_there, atol=0.1, rtol=0)
