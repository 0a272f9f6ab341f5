"""What a fit imports before its first step: no more than it needs."""

import json
import subprocess
import sys

import pytest

NOT_NEEDED = ["transformers", "scipy", "torchmetrics.functional", "submitit", "datasets", "pyarrow", "sae_lens", "zarr"]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def imported():
    """Modules that a fit of a toy has imported when its trainer is about to start."""
    code = (
        "import json, sys\n"
        "from hedgelab.cli.startup import defer_torchmetrics\n"
        "defer_torchmetrics()\n"
        "import hedgelab.cli.lightning, hedgelab.metrics.evaluation\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    return json.loads(run(code))


def test_a_fit_imports_what_it_needs_and_little_else(imported):
    assert {"torch", "lightning.pytorch", "torchmetrics.metric"} <= set(imported)
    assert [name for name in NOT_NEEDED if name in imported] == []


def test_torchmetrics_is_whole_as_soon_as_it_is_asked_for():
    code = (
        "from hedgelab.cli.startup import defer_torchmetrics\n"
        "defer_torchmetrics()\n"
        "import sys, torchmetrics\n"
        "from torchmetrics import Metric\n"
        "assert 'torchmetrics.functional' not in sys.modules\n"
        "from torchmetrics import MeanMetric\n"
        "import torchmetrics.functional, pickle\n"
        "assert issubclass(MeanMetric, Metric) and Metric is torchmetrics.metric.Metric\n"
        "mean = pickle.loads(pickle.dumps(MeanMetric()))\n"
        "mean.update(2.0); mean.update(4.0)\n"
        "print(float(mean.compute()), hasattr(torchmetrics, 'Nothing'), torchmetrics.Accuracy.__name__)\n"
    )
    assert run(code) == "3.0 False Accuracy"
