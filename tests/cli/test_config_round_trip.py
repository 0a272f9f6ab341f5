"""Whatever config is written, what ``--print_config`` shows of it reads back as itself."""

import contextlib
import io
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hedgelab.cli import main

NUMBERS = st.floats(1e-6, 1e3, allow_nan=False)
PROBABILITIES = st.floats(0.0, 1.0)
FIRINGS = st.one_of(
    st.fixed_dictionaries(
        {
            "class_path": st.just("IndependentFiring"),
            "init_args": st.fixed_dictionaries({"probabilities": st.lists(PROBABILITIES, min_size=1, max_size=4)}),
        }
    ),
    st.fixed_dictionaries(
        {
            "class_path": st.just("ConditionalFiring"),
            "init_args": st.fixed_dictionaries(
                {
                    "features": st.tuples(
                        PROBABILITIES, st.fixed_dictionaries({"f0": PROBABILITIES, "otherwise": PROBABILITIES})
                    ).map(list)
                }
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "class_path": st.just("CopulaFiring"),
            "init_args": st.fixed_dictionaries(
                {
                    "n": st.integers(2, 6),
                    "rates": st.builds(
                        lambda total: {"class_path": "Zipf", "init_args": {"total": total}}, st.floats(0.5, 1.5)
                    ),
                }
            ),
        }
    ),
)
OPTIMIZERS = st.one_of(
    st.just("Adam"),
    st.builds(lambda lr: {"class_path": "torch.optim.Adam", "init_args": {"lr": lr}}, NUMBERS),
    st.builds(lambda lr: {"class_path": "torch.optim.SGD", "init_args": {"lr": lr, "momentum": 0.9}}, NUMBERS),
)
TOPK = st.fixed_dictionaries(
    {"d_sae": st.integers(3, 9), "k": st.integers(1, 3), "optimizer": OPTIMIZERS, "dead_after_steps": st.integers(1, 10**6)},
    optional={"gradient_clip_norm": NUMBERS, "init": st.fixed_dictionaries({"b_dec": st.sampled_from(["zeros", "mean"])})},
)
MODELS = st.one_of(
    st.builds(lambda kind, args: {"class_path": kind, "init_args": args}, st.sampled_from(["TopKSAE", "BatchTopKSAE"]), TOPK),
    st.builds(
        lambda lr, l1: {"class_path": "VanillaSAE", "init_args": {"d_sae": 2, "l1_coefficient": l1, "optimizer": lr}},
        OPTIMIZERS,
        NUMBERS,
    ),
    st.builds(
        lambda args: {
            "class_path": "MatryoshkaSAE",
            "init_args": {"levels": [1, args["d_sae"]], "inner": {"class_path": "BatchTopKSAE", "init_args": args}},
        },
        TOPK,
    ),
)
CONFIGS = st.fixed_dictionaries(
    {
        "seed_everything": st.integers(0, 2**31),
        "trainer": st.fixed_dictionaries({"max_steps": st.integers(1, 10**9), "log_every_n_steps": st.integers(1, 1000)}),
        "data": st.builds(
            lambda firing, batch: {
                "class_path": "ToyDataModule",
                "init_args": {"d_in": 8, "batch_size": batch, "firing": firing},
            },
            FIRINGS,
            st.integers(1, 10**6),
        ),
        "model": MODELS,
    },
    optional={
        "name": st.text("abc é:#'\"-{}", max_size=8).map("n".__add__),  # by itself '#' is YAML's null
        "experiment": st.text("xyz 1_.", min_size=1, max_size=9),
        "guard": st.just({"on_nonfinite": "skip"}),
        "checkpoint": st.fixed_dictionaries({"every_n_train_steps": st.integers(1, 10**6)}),
    },
)


def printed(file):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["fit", f"--config={file}", "--print_config"])
    assert code == 0, err.getvalue()
    return yaml.safe_load(out.getvalue())


def holds(part, whole):
    """Whether everything that was written is there, with its value."""
    if isinstance(part, dict):
        if "class_path" in part:
            return whole["class_path"].endswith(part["class_path"]) and holds(part["init_args"], whole["init_args"])
        return all(holds(value, whole[key]) for key, value in part.items())
    if isinstance(whole, dict) and "class_path" in whole:
        return whole["class_path"].endswith(part)
    return part == whole or (isinstance(part, float) and part == pytest.approx(whole))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=CONFIGS)
def test_printed_configs_read_back_as_themselves(config, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    (folder / "written.yaml").write_text(yaml.safe_dump(config))
    first = printed(folder / "written.yaml")
    assert holds(config, first)
    (folder / "printed.yaml").write_text(yaml.safe_dump(first))
    assert printed(Path(folder / "printed.yaml")) == first
