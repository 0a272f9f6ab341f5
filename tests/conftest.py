"""What holds for every test: the same hypothesis examples on every run, and shares of the slow tests for CI.

``HYPOTHESIS_PROFILE=long`` searches at random, for long; without it the examples are the same wherever and whenever the
tests run. ``--slow-share 3/12`` runs the third of twelve shares of the slow tests instead of the fast ones; CI goes through
the shares in turn, so that a dozen runs in a row run all of them. ``HEDGELAB_SKIPPED=FILE`` lists what was skipped, for
``pytest @FILE`` in an environment that has what was missing.
"""

import os
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("same", derandomize=True, deadline=None, database=None, suppress_health_check=SUPPRESSED)
settings.register_profile("long", max_examples=2000, deadline=None, suppress_health_check=SUPPRESSED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_addoption(parser):
    parser.addoption("--slow-share", metavar="I/N", help="run share I of N of the slow tests instead of the fast ones")


def pytest_configure(config):
    if share := config.getoption("--slow-share"):
        number, count = (int(part) for part in share.split("/"))
        if not 1 <= number <= count:
            raise pytest.UsageError(f"--slow-share: expected I/N with 1 <= I <= N, got {share}")
        config.option.markexpr = "slow and not gpu"


def pytest_collection_modifyitems(config, items):
    if not (share := config.getoption("--slow-share")):
        return
    number, count = (int(part) for part in share.split("/"))
    # By the name of the test: a new test changes no other's share.
    kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == number - 1]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_sessionfinish(session, exitstatus):
    """A share that no slow test falls into is as good as one that passes."""
    if session.config.getoption("--slow-share") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter):
    if file := os.environ.get("HEDGELAB_SKIPPED"):
        skipped = dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("skipped", []))
        Path(file).write_text("\n".join(skipped))


@pytest.fixture(autouse=True)
def restored_default_dtype():
    """Put back the default type of tensors, which a model that fails to load in half precision leaves changed."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def gpu():
    """A GPU without one (``tests/second_device.py``), while the test runs."""
    pytest.importorskip("triton", reason="the device's kernels are in it")
    pytest.importorskip("transformers", reason="needs hedgelab[llm]")
    sys.path.insert(0, str(Path(__file__).parent))
    import second_device

    with second_device.second_device():
        yield second_device
