import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "transformers: needs this package, which is optional; .ci/run has it")
    config.addinivalue_line("markers", "slow: trains, or starts processes; -m \"not slow\" leaves it out")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item, cuda=torch.cuda.is_available, visible=os.environ.get("CUDA_VISIBLE_DEVICES")):
    """Tests that are not marked gpu see no GPU, nor do the processes that they start: the CPU is exact."""
    gpu = "gpu" in item.keywords
    torch.cuda.is_available = cuda if gpu else lambda: False
    os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "") if gpu else ""
    if gpu and visible is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
