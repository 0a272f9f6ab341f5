"""Kernels on split weights and split batches give, part by part, what the same kernels give on the whole."""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.ranks import ALONE, Ranks, Share, among_largest
from hedgelab.kernels.selection import Product, select_batch_topk
from hedgelab.kernels.sharded import ShardedCodes
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, JumpReLU, ReLU, Target, Threshold, TopK

D_IN, D_SAE, BATCH, K = 12, 640, 64, 5


def weights(dtype=torch.float64, d_sae=D_SAE):
    torch.manual_seed(0)
    shapes = {"x": (BATCH, D_IN), "W_enc": (d_sae, D_IN), "b_enc": (d_sae,), "W_dec": (d_sae, D_IN), "b_dec": (D_IN,)}
    made = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return made | {"W_enc": made["W_enc"].t(), "b_enc": 0.1 * made["b_enc"]}


def spread(made, mesh):
    """The weights as DTensors with gradients."""
    placements = {"W_enc": Shard(1), "b_enc": Shard(0), "W_dec": Shard(0), "b_dec": Replicate()}
    rank, count = mesh.get_local_rank(), mesh.size()
    split = {"x": made["x"]}
    for name, placement in placements.items():
        own = made[name].chunk(count, placement.dim)[rank] if placement.is_shard() else made[name]
        split[name] = DTensor.from_local(own.clone(), mesh, [placement], run_check=False).requires_grad_()
    return split


def encode(kind, w, weight=None):
    scale = w["W_dec"].detach().norm(dim=1) if kind.startswith("scaled") else None
    args = (w["x"], Encoder(w["W_enc"], w["b_enc"], w["b_dec"], scale))
    match kind:
        case "relu":
            return ops.encode(*args, ReLU())
        case "topk" | "scaled_topk":
            return ops.encode(*args, TopK(K))
        case "signed_topk" | "scaled_signed_topk":
            return ops.encode(*args, TopK(K, signed=True))
        case "batch_topk" | "scaled_batch_topk":
            return ops.encode(*args, BatchTopK(K, weight))
        case "columns":
            return ops.encode(*args, TopK(K, torch.arange(7, D_SAE // 3, 5)))
        case "threshold":
            return ops.encode(*args, Threshold(torch.tensor(3.0, dtype=torch.float64)))
        case "jumprelu":
            return ops.encode(*args, JumpReLU(torch.ones_like(w["b_enc"].detach()).requires_grad_(), 0.1))
    raise ValueError(kind)


KINDS = (
    "relu",
    "topk",
    "scaled_topk",
    "signed_topk",
    "scaled_signed_topk",
    "batch_topk",
    "scaled_batch_topk",
    "columns",
    "threshold",
    "jumprelu",
)


def gradient(weight):
    """Zeros for a process none of whose latents take part."""
    return torch.zeros_like(weight.detach()) if weight.grad is None else weight.grad


def outcome(kind, w, backend, detach, weight=None, tilt=0.0):
    with ops.backend(backend):
        codes, decoder = encode(kind, w, weight), Decoder(w["W_dec"], w["b_dec"])
        rates = codes.rates
        losses, errors = ops.level_errors(codes, decoder, Target(w["x"], (100, 400, D_SAE), detach, weight, tilt))
        loss = torch.stack(list(losses)) @ torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
        penalty = codes.sum_per_latent(weight) * w["W_dec"].norm(dim=1)
        loss = loss + ops.total(penalty) + 2 * ops.total(penalty, slice(100)) + ops.total(penalty, slice(100, 400))
        loss = loss if rates is None else loss + ops.total(rates)
        loss.backward()
        return {
            "codes": codes.gathered().to_dense().detach(),
            "fired": codes.fired(),
            "of_decoder": ops.decoder_gradient(codes, torch.stack(list(errors)), (100, 400, D_SAE)),
            "smallest": codes.smallest_positive(),
            "reconstruction": ops.decode(codes, decoder).detach(),
            "loss": loss.detach(),
            **{f"error{level}": error for level, error in enumerate(errors)},
            **{name: gradient(w[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
        }


def gloo(rank):
    dist.init_process_group("gloo")
    return rank


def check_split_latents(rank):
    gloo(rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    population = torch.rand(BATCH, dtype=torch.float64).softmax(0)
    for kind in KINDS:
        for backend in ("dense", "sparse"):
            for detach, tilt in ((False, 0.0), (True, 0.0), ("all_but_last", 0.5)):
                for weight in (None, population):
                    made = weights()
                    whole = {name: value.requires_grad_(name != "x") for name, value in made.items()}
                    expected = outcome(kind, whole, backend, detach, weight, tilt)
                    split = spread({name: value.detach() for name, value in made.items()}, mesh)
                    found = outcome(kind, split, backend, detach, weight, tilt)
                    for name, value in expected.items():
                        own = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
                        torch.testing.assert_close(own, value, msg=lambda m: f"{kind} {backend} {detach} {name}: {m}")  # noqa: B023


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_split_latents(on_ranks, count):
    on_ranks(count, check_split_latents)


def lone_latents(w, levels):
    """Codes, errors and gradients where every row has one latent and can be no better: encoder gradients are 0."""
    codes = ops.encode(w["x"], Encoder(w["W_enc"], w["b_enc"], w["b_dec"]), TopK(1))
    losses, errors = ops.level_errors(codes, Decoder(w["W_dec"], w["b_dec"]), Target(w["x"], levels))
    torch.stack(list(losses)).sum().backward()
    return codes, torch.stack(list(errors)), {name: gradient(w[name]) for name in ("W_enc", "b_enc", "W_dec")}


def check_lone_latents(rank):
    """Bit for bit the numbers of one process, also on a part so narrow that it would take another path if it were alone."""
    gloo(rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = weights(torch.float32)
    made["W_dec"] = torch.nn.functional.normalize(made["W_dec"])
    made |= {"W_enc": made["W_dec"].clone().t(), "b_enc": torch.zeros(D_SAE)}
    for levels in ((D_SAE,), (100, 400, D_SAE)):
        split = spread(made, mesh)
        codes, errors, grads = lone_latents(split, levels)
        assert codes.layout is not None
        whole = {name: value.clone().requires_grad_() for name, value in made.items()}
        _, expected, wanted = lone_latents(whole, levels)
        assert torch.equal(errors, expected)
        for name, atol in (("b_enc", 1e-6), ("W_enc", 1e-6), ("W_dec", 1e-6)):  # sums over rows in a sparse product's order
            torch.testing.assert_close(grads[name].full_tensor(), wanted[name], rtol=1e-6, atol=atol)


@pytest.mark.parametrize("count", [2, 4])
def test_a_row_with_one_latent_is_rounded_as_by_one_process(on_ranks, count):
    on_ranks(count, check_lone_latents)


def check_layouts(rank):
    """Many latents of the first process fire, and few of the others; the parts of an SAE take one path all the same."""
    gloo(rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = weights()
    made["b_enc"] = torch.where(torch.arange(D_SAE) < D_SAE // dist.get_world_size(), 3.0, -9.0).double()
    split = spread(made, mesh)
    encoder = Encoder(*(split[name].detach() for name in ("W_enc", "b_enc", "b_dec")))
    whole = ops.encode(made["x"], Encoder(made["W_enc"], made["b_enc"], made["b_dec"]), ReLU())
    selections = (ReLU(), Threshold(torch.tensor(0.0, dtype=torch.float64)))
    parts = [ops.encode(made["x"], encoder, selection) for selection in selections]
    for part in parts:
        torch.testing.assert_close(part.gathered().to_dense(), whole.to_dense())
    assert (parts[0].layout is None) == (whole.layout is None)
    sparse = Codes.from_csr(*parts[0].csr(), parts[0].d_sae)
    mixed = parts[0] if rank else ShardedCodes(sparse.values, sparse.layout, mesh=mesh)
    torch.testing.assert_close(mixed.gathered().to_dense(), whole.to_dense())


def test_parts_of_one_sae_agree_on_a_layout(on_ranks):
    on_ranks(2, check_layouts)


def check_split_batch(rank, ties):
    gloo(rank)
    ranks = Ranks.of(None)
    for backend in ("dense", "sparse"):
        for scaled in (False, True):
            w = weights()
            if ties:  # the same few examples again and again, as in toys
                w["x"] = w["x"][torch.arange(BATCH) % 5]
            scale = w["W_dec"].norm(dim=1) if scaled else None
            encoder = Encoder(w["W_enc"], w["b_enc"], w["b_dec"], scale)
            mine = slice(rank * BATCH // ranks.size, (rank + 1) * BATCH // ranks.size)
            with ops.backend(backend):
                whole = ops.encode(w["x"], encoder, BatchTopK(K)).to_dense()
                part = ops.encode(w["x"][mine], encoder, BatchTopK(K, None, ranks)).to_dense()
            found = ranks.cat(part)
            assert int((found > 0).sum()) == K * BATCH
            if ties:  # which of equals a single rank's dense path keeps is not said; what they sum to is
                found, whole = found.sum(0), whole.sum(0)
            torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("ties", [False, True])
def test_batch_topk_of_a_split_batch(on_ranks, ties):
    on_ranks(4, check_split_batch, ties)


def check_tilted_batch(rank):
    """The mean over ranks of losses and gradients is those of one process, also where a rank has the outlier to itself."""
    gloo(rank)
    ranks = Ranks.of(None)
    made, levels = weights(), (100, D_SAE)
    made["x"][-1] *= 9
    population = torch.rand(BATCH).double().softmax(0)
    mine = slice(rank * BATCH // ranks.size, (rank + 1) * BATCH // ranks.size)
    for backend in ("dense", "sparse"):
        for weight in (None, population):
            found = []
            for rows, share, over in ((slice(None), 1, ALONE), (mine, ranks.size, ranks)):
                w = {name: value.clone().requires_grad_(name != "x") for name, value in made.items()}
                with ops.backend(backend):
                    codes = ops.encode(w["x"][rows], Encoder(w["W_enc"], w["b_enc"], w["b_dec"]), TopK(K))
                    given = None if weight is None else weight[rows] * share
                    target = Target(w["x"][rows], levels, "all_but_last", given, 1.5, over)
                    losses = torch.stack(list(ops.level_errors(codes, Decoder(w["W_dec"], w["b_dec"]), target)[0]))
                losses.sum().backward()
                values = [losses.detach(), *(w[name].grad for name in ("W_enc", "b_enc", "W_dec", "b_dec"))]
                found.append([over.mean(value) for value in values])
            for whole, split in zip(*found, strict=True):
                torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [2, 4])
def test_a_tilted_loss_of_a_split_batch(on_ranks, count):
    on_ranks(count, check_tilted_batch)


def check_part_of_both(rank):
    """Rows split over two groups of processes, latents over the two of each: every one selects its quarter of the whole."""
    gloo(rank)
    torch.manual_seed(2)
    x, W_enc = torch.randn(BATCH, D_IN), torch.randn(D_IN, D_SAE)
    pre = x @ W_enc
    kept = torch.zeros(BATCH * D_SAE, dtype=torch.bool).index_fill(0, pre.flatten().topk(K * BATCH).indices, True)
    row, latent = rank // 2 * BATCH // 2, rank % 2 * D_SAE // 2
    rows, latents = slice(row, row + BATCH // 2), slice(latent, latent + D_SAE // 2)
    part = Product(x[rows], W_enc[:, latents], torch.zeros(D_SAE // 2), torch.float32)
    found = select_batch_topk(part, K, None, Share(Ranks.of(None), BATCH, D_SAE, row, latent)).to_dense()
    torch.testing.assert_close(found, pre[rows, latents] * kept.view_as(pre)[rows, latents])


def test_a_selection_from_parts_of_rows_and_latents(on_ranks):
    on_ranks(4, check_part_of_both)


def check_agreement(rank, dtype):
    gloo(rank)
    ranks = Ranks.of(None)
    torch.manual_seed(1)
    for size in (1, 7, 1000):
        whole = torch.randn(ranks.size * size, dtype=dtype) * 10.0 ** torch.randint(-30, 30, (ranks.size * size,))
        whole[::3] = whole[0].abs()  # many equal ones
        positions = torch.randperm(len(whole))
        mine = slice(rank * size, (rank + 1) * size)
        for wanted in (1, size // 2 + 1, ranks.size * size // 3, ranks.size * size):
            order = sorted(range(len(whole)), key=lambda i: (-float(whole[i]), int(positions[i])))
            expected = {i for i in order[:wanted] if whole[i] > 0}
            kept = among_largest(whole[mine], positions[mine].__getitem__, wanted, ranks)
            assert {rank * size + int(i) for i in kept.nonzero()} == {i for i in expected if mine.start <= i < mine.stop}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_among_largest_is_exact_ties_and_all(on_ranks, dtype):
    on_ranks(3, check_agreement, dtype)


@pytest.mark.parametrize(("wanted", "kept"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_the_largest_of_one_process(wanted, kept):
    values, positions = torch.tensor([3.0, 1.0, 2.0, 2.0, -5.0, 0.0]), torch.arange(6).flip(0)
    found = among_largest(values, positions.__getitem__, wanted, ALONE)
    assert found.nonzero().flatten().tolist() == kept


def test_positions_differ_between_parts():
    rows, latents = (grid.flatten() for grid in torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"))
    parts = [Share(ALONE, 4, 6, row, latent) for row in (0, 2) for latent in (0, 3)]
    numbers = torch.cat([part.positions(rows, latents) for part in parts])
    assert numbers.sort().values.tolist() == list(range(24))
