"""Settings and fixtures of all tests. The tests use no network and one thread."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the toolkit, which is imported after torch here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from support.models import FAMILIES, make_model  # noqa: E402

torch.set_num_threads(1)  # on tensors this small, threads mostly wait for each other


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_model("llama")
