"""Settings and fixtures of all tests. The tests use no network and one thread."""

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the toolkit, which is imported after torch here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from gspo.policy import vllm_extension, vllm_server  # noqa: E402
from gspo.policy.model_loader import load_model  # noqa: E402
from support.fake_vllm import FakeVLLM  # noqa: E402
from support.models import FAMILIES, make_model  # noqa: E402

torch.set_num_threads(1)  # on tensors this small, threads mostly wait for each other


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def start_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeVLLM]]:
    """Returns a function that starts a fake server with `tiny`, or with another model and tokenizer."""
    monkeypatch.setattr(vllm_extension, "_rebuild_output_layers", lambda model: None)
    monkeypatch.setattr(vllm_server, "HEALTH_INTERVAL_S", 0.01)
    servers = []

    def start(model=None, tokenizer=None):
        tiny = load_model("tiny", device="cpu")
        servers.append(FakeVLLM(model or tiny[0], tokenizer or tiny[1]))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_model("llama")
