"""A small server with the part of vLLM's protocol that gspo/policy/vllm_server.py uses, and with its faults.

It samples from a model of ours, one token at a time and without a cache, so that what an engine makes of its
answers can be checked against the model. As a script it takes the flags of vLLM's own server.
"""

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gspo.policy import vllm_extension
from gspo.policy.lora import add_adapters, load_adapters
from gspo.policy.vllm_extension import PolicyWorker

# While peft makes a layer, it changes torch.nn for all threads.
_adding_adapters = threading.Lock()


class FakeVLLM:
    """A server on a free port. Its faults are attributes, and can be changed while it works."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, port: int = 0) -> None:
        self.started_with, self.tokenizer = model, tokenizer
        self.logprobs_mode = "processed_logprobs"  # what it says
        self.cuts_prompts = False
        self.without_temperature = False  # what it does
        self.top_p = 1.0
        self.loads = True  # False: it says that it has loaded weights, but has not
        self.keeps_version = False
        self.refuses_health = 0  # so many times
        self.fails = 0  # so many times, with an internal error
        self.dies_at: int | None = None  # the number of the request to generate, from 1, of which it dies
        self.edit_answer: Callable[[dict], None] = lambda answer: None
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.requests: Counter[str] = Counter()
        self.generated = 0  # requests to generate
        self._lock = threading.RLock()
        self.restart()
        self._http = _Server(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def restart(self) -> None:
        """Have the weights again that it was started with."""
        self.model, self.version = deepcopy(self.started_with), "default"
        self.adapted: dict[str, PreTrainedModel] = {}  # the model with adapters, by their names

    def stop(self) -> None:
        self.may_answer.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Return the status and the JSON of the answer. Raises ConnectionError where it dies."""
        with self._lock:
            self.requests[path] += 1
        if path == "/health":
            self.refuses_health -= 1
            return (503, None) if self.refuses_health >= 0 else (200, None)
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"])["input_ids"]}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = self.version if self.keeps_version else body["new_version"]
            return 200, {"success": True}
        if path == "/reset_prefix_cache?reset_running_requests=true":
            return 200, {"success": True}
        if path == "/collective_rpc":
            return 200, {"results": [getattr(_Worker(self), body["method"])(*body["args"])]}
        if path == "/v1/load_lora_adapter":
            return self._load_adapters(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            return (200, None) if self.adapted.pop(body["lora_name"], None) else (404, None)
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in ("policy", *self.adapted)]}
        if path == "/inference/v1/generate":
            return self._generate(body)
        return 404, {"detail": "Not Found"}

    def _load_adapters(self, name: str, folder: Path) -> tuple[int, Any]:
        if name in self.adapted:
            return 400, {"error": {"message": f"{name} has already been loaded"}}
        if not folder.is_dir():
            return 404, {"error": {"message": "no adapter found"}}
        model = deepcopy(self.started_with)
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        with _adding_adapters:
            add_adapters(model, rank, 0, "policy")
        if self.loads:
            load_adapters(model, folder)
        self.adapted[name] = model
        return 200, None

    def _generate(self, body: dict) -> tuple[int, Any]:
        self.may_answer.wait()
        with self._lock:
            self.generated += 1
            if self.generated == self.dies_at:
                self.restart()
                raise ConnectionError
            self.fails -= 1
            if self.fails >= 0:
                return 500, {"error": {"message": "out of memory"}}
            name = body.get("model", "policy")
            if name not in ("policy", *self.adapted):
                return 404, {"error": {"message": f"The model `{name}` does not exist."}}
            model = self.adapted.get(name, self.model)
            if max(body["token_ids"]) >= self.model.config.vocab_size:
                return 400, {"error": {"message": "out of vocabulary"}}
            parameters = {"n": 1, "seed": 0, "stop_token_ids": [], **body["sampling_params"]}
            answer = {
                "choices": [
                    self._choice(model, body["token_ids"], parameters, g) for g in range(parameters["n"])
                ]
            }
            if "prompt_logprobs" in parameters:
                answer["prompt_logprobs"] = self._prompt_log_probs(model, body["token_ids"])
            self.edit_answer(answer)
            return 200, answer

    def _choice(self, model: PreTrainedModel, prompt: list[int], parameters: dict, index: int) -> dict:
        random = np.random.default_rng(parameters["seed"] + index)
        temperature = parameters["temperature"] or 1.0
        ids: list[int] = []
        content = []
        while len(ids) < parameters["max_tokens"] and not (ids and ids[-1] in parameters["stop_token_ids"]):
            logits = _logits(model, prompt + ids)[-1]
            log_probs = torch.log_softmax(logits / temperature, -1)
            probs, order = log_probs.exp().sort(descending=True)
            log_probs[order[probs.cumsum(-1) - probs >= self.top_p]] = -torch.inf
            log_probs = torch.log_softmax(log_probs, -1)
            token = int(random.choice(len(log_probs), p=log_probs.exp().numpy()))
            if parameters["temperature"] == 0:
                token = int(logits.argmax())
            if self.without_temperature:
                log_probs = torch.log_softmax(logits, -1)
            ids.append(token)
            content.append({"token_id": token, "logprob": float(log_probs[token])})
        return {
            "index": index,
            "token_ids": ids,
            "logprobs": {"content": content},
            "finish_reason": "length" if len(ids) == parameters["max_tokens"] else "stop",
            "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
        }

    def _prompt_log_probs(self, model: PreTrainedModel, ids: list[int]) -> list:
        log_probs = torch.log_softmax(_logits(model, ids), -1)
        known = [{str(token): {"logprob": float(log_probs[i, token])}} for i, token in enumerate(ids[1:])]
        return [None, *known]


def _logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


class _Worker(PolicyWorker):
    """What vLLM's worker has, as far as PolicyWorker uses it."""

    def __init__(self, server: FakeVLLM) -> None:
        self.server = server
        self.model_config = SimpleNamespace(
            hf_text_config=server.model.config,
            logprobs_mode=server.logprobs_mode,
            dtype=server.model.dtype,
        )
        self.vllm_config = SimpleNamespace(
            device_config=SimpleNamespace(device_type="cpu"),
            scheduler_config=SimpleNamespace(enable_chunked_prefill=server.cuts_prompts),
        )

    def reload_weights(self, weights_path: str) -> None:
        if self.server.loads:
            # A tied output layer has no weights of its own in the file.
            weights = {}
            for path in Path(weights_path).glob("*.safetensors"):
                weights |= load_file(path)
            self.server.model.load_state_dict(weights, strict=False)

    def get_model(self) -> PreTrainedModel:
        return self.server.model


def _handler(server: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: Any) -> None:
            try:
                status, answer = server.answer(self.path, body)
            except ConnectionError:
                return  # the connection is closed without an answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_arguments: Any) -> None:
            pass

    return Handler


def main() -> None:
    """Serve as vLLM's server does that gspo/policy/vllm_process.py starts."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--port", "--dtype"):
        parser.add_argument(name)
    given = parser.parse_known_args()[0]
    torch.set_num_threads(1)
    vllm_extension._rebuild_output_layers = lambda model: None
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
    FakeVLLM(model.eval(), AutoTokenizer.from_pretrained(given.model), int(given.port))
    print("serving", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
