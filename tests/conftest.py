"""Settings and fixtures of all tests: no network, one thread."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

from support.models import FAMILIES, make_model  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def llama():
    return make_model("llama")
