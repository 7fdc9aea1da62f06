"""One vLLM server by its URL: its requests, what they may take, and the weights that it must have.

vllm_process.py starts such servers, and docs/vllm.md has the command for a server of one's own.

Token ids go in and token ids come out, never text (POST /inference/v1/generate). Every response names the
version of the weights that sampled it; of LoRA adapters, the version is the name by which they are asked for.
A response of another version is never used: the server has been started again, so it gets the weights again,
and is asked again.
"""

import http.client
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gspo.policy.model_cache import VLLM_VERSION
from gspo.policy.vllm_process import VLLMProcess
from gspo.printing import say

# Seconds that a server may take to start, or to come back after it died. On a busy CPU, a small model takes
# three minutes.
START_TIMEOUT_S = 600.0
# Seconds that a server may take to answer: the groups of a rollout batch wait for one another in it.
ANSWER_TIMEOUT_S = 1800.0
# Seconds to answer what costs nothing.
HEALTH_TIMEOUT_S = 10.0
# Seconds between two looks whether it is ready.
HEALTH_INTERVAL_S = 1.0
# How often a request is made if the server dies of it or answers with an internal error.
ATTEMPTS = 3
# Shows the server's tokenizer: it has digits, spaces, a line end and a letter beyond ASCII.
TOKENIZER_SAMPLE = "What is 12 + 345?\n  Answer: é"
NO_VLLM = f"it does not answer as vLLM {VLLM_VERSION} does: is it the right URL?"
# The types that a server may compute in.
TYPES = ("float32", "float16", "bfloat16")


class EngineError(RuntimeError):
    """A server cannot be used. The message is one line: which server, what is wrong, what to do."""


@dataclass(frozen=True)
class Expected:
    """Properties that an engine expects of each of its servers, and how long it waits for them.

    shape: the settings in vllm_extension.SHAPE that its model must have.
    sample: the token ids that its tokenizer must make of TOKENIZER_SAMPLE.
    adapters: the weights that it gets are LoRA adapters, for the model that it was started with.
    """

    shape: dict[str, Any]
    sample: Sequence[int]
    adapters: bool = False
    start_timeout_s: float = START_TIMEOUT_S
    answer_timeout_s: float = ANSWER_TIMEOUT_S


class VLLMServer:
    """A server by its URL. Its methods raise EngineError if it does not answer as it must.

    Args:
        process: the server itself, if this process has started it.
    """

    def __init__(self, url: str, expected: Expected, process: VLLMProcess | None = None) -> None:
        self.url, self.expected, self.process = url.rstrip("/"), expected, process
        self.dtype = ""  # in which it computes; known once it has answered
        self.weights: tuple[Path, str] | None = None  # folder and version
        self._loading = threading.Lock()
        self._waiting = False
        # Servers stand in the same network: a proxy for the web is not asked.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def error(self, what: str) -> EngineError:
        log = f" (its log: {self.process.kept_log()})" if self.process else ""
        return EngineError(f"vLLM server {self.url}: {' '.join(what.split())}{log}")

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Name an answer that lacks what it should have, or has it in another form."""
        try:
            yield
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise self.error(f"{NO_VLLM} ({type(error).__name__}: {error})") from error

    def connect(self) -> None:
        """Wait until it is ready, and refuse another model, tokenizer or kind of log-probabilities."""
        self._wait_until_ready()
        self._retry(self._refuse_other_settings)

    def load(self, folder: Path, version: str) -> None:
        """Take the weights in a folder, forget keys and values of older ones, and read the version back."""
        older, self.weights = self.weights, None  # a server that dies now is not given the older ones
        self._retry(partial(self._load, folder, version))
        self.weights = folder, version
        if older and self.expected.adapters:
            self._retry(partial(self._unload_adapters, older[1]))

    def generate(self, body: dict) -> dict:
        """POST /inference/v1/generate, until the answer is from the weights that were loaded last."""
        found: set[str] = set()
        for _ in range(ATTEMPTS):
            answer, found = self._retry(partial(self._generate, body))
            if self.weights is None:
                return answer
            folder, version = self.weights
            if found == {version}:
                return answer
            with self._loading:  # the first of the requests that see it loads; the others then find it done
                if self._retry(self._version) != version:
                    say(f"{self.url} was started again: it gets the weights again", sys.stderr)
                    self._retry(partial(self._load, folder, version))
        raise self.error(f"stale weights: it answers with those of version {found}, not {version}")

    def sleep(self) -> None:
        """Let go of its GPU memory. Needs --enable-sleep-mode."""
        self._retry(partial(self._request, "/sleep?level=1", {}, self.expected.answer_timeout_s))

    def wake_up(self) -> None:
        self._retry(partial(self._request, "/wake_up", {}, self.expected.answer_timeout_s))

    # ---- requests that are not repeated

    def _generate(self, body: dict) -> tuple[dict, set[str]]:
        """The answer, and the versions of the weights that it is from: none if it has lost its adapters."""
        path = "/inference/v1/generate"
        if not (self.expected.adapters and self.weights):
            answer = self._ask(path, body)
            return answer, {x["version"] for choice in answer["choices"] for x in choice["weight_versions"]}
        version = self.weights[1]
        try:
            return self._ask(path, body | {"model": version}), {version}
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return {}, set()

    def _refuse_other_settings(self) -> None:
        found = self._describe()
        if found["shape"] != self.expected.shape:
            raise self.error(f"it has another model: {found['shape']} instead of {self.expected.shape}")
        if found["logprobs_mode"] != "processed_logprobs":
            raise self.error(
                f"its log-probabilities are {found['logprobs_mode']}, those without temperature: start it "
                "with --logprobs-mode processed_logprobs"
            )
        if found["dtype"] not in TYPES:
            raise self.error(f"it computes in {found['dtype']}: start it with --dtype bfloat16 or float32")
        if found["dies_of_seeds"]:
            raise self.error("on a CPU, it dies of seeds: start it with --no-enable-chunked-prefill")
        self.dtype = found["dtype"]
        encoded = self._ask("/tokenize", {"prompt": TOKENIZER_SAMPLE, "add_special_tokens": False})
        if encoded["tokens"] != list(self.expected.sample):
            raise self.error("it has another tokenizer than the trainer")

    def _describe(self) -> dict:
        """Ask the server's worker for its model and settings (vllm_extension.describe_policy)."""
        try:
            return self._ask_workers("describe_policy")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise self.error("it takes no weights: start it with VLLM_SERVER_DEV_MODE=1") from error
            if "describe_policy" in error.msg:
                raise self.error(
                    "it lacks the toolkit's methods: start it with the repository in PYTHONPATH and "
                    "--worker-extension-cls gspo.policy.vllm_extension.PolicyWorker"
                ) from error
            raise

    def _load(self, folder: Path, version: str) -> None:
        """All steps of load(), without trying again: a server that is started in between begins anew."""
        self._refuse_other_settings()
        if self.expected.adapters:
            self._load_adapters(folder, version)
        else:
            problem = self._ask_workers("load_policy", str(folder))["error"]
            if problem:
                raise self.error(problem)
        # Requests that other threads have made of a restarted server may be running. They begin anew, and the
        # older version in their answers has them made again.
        if not self._ask("/reset_prefix_cache?reset_running_requests=true", {})["success"]:
            raise self.error("it keeps the prefix cache of older weights")
        if not self.expected.adapters:
            self._ask("/update_weight_version", {"new_version": version})
        found = self._version()
        if found != version:
            raise self.error(f"stale weights: it says version {found} after {version} was loaded")

    def _load_adapters(self, folder: Path, version: str) -> None:
        body = {"lora_name": version, "lora_path": str(folder)}
        try:
            self._request("/v1/load_lora_adapter", body, self.expected.answer_timeout_s)
        except urllib.error.HTTPError as error:
            if "already been loaded" in error.msg:  # by an earlier request, whose answer was lost
                return
            raise self.error(
                f"it does not load adapters from {folder} ({error.msg}): share the folder with it, and start "
                "it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank"
            ) from error

    def _unload_adapters(self, version: str) -> None:
        try:
            self._request("/v1/unload_lora_adapter", {"lora_name": version}, self.expected.answer_timeout_s)
        except urllib.error.HTTPError as error:
            if error.code != 404:  # a server that was started again has them no longer
                raise

    def _version(self) -> str:
        """The version of the weights that it has; of adapters, the newest."""
        if not self.expected.adapters:
            return self._ask("/weight_info")["weight_version"]
        return self._ask("/v1/models")["data"][-1]["id"]

    def _ask_workers(self, method: str, *arguments: str) -> dict:
        """Call a method of vllm_extension.PolicyWorker. The workers of a server must agree."""
        results = self._ask("/collective_rpc", {"method": method, "args": arguments})["results"]
        if any(result != results[0] for result in results):
            raise self.error(f"its workers differ in {method}: {results}")
        return results[0]

    def _ask(self, path: str, body: dict | None = None) -> Any:
        """One request: GET, or POST of a body. Returns the answer's JSON."""
        return json.loads(self._request(path, body, self.expected.answer_timeout_s))

    def _request(self, path: str, body: dict | None, timeout_s: float) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            error.msg = _message_in(error.read().decode(errors="replace")) or error.msg
            raise

    # ---- patience

    def _retry(self, call: Callable[[], Any]) -> Any:
        """Return what the call returns. If the server dies of it or has an internal error, call again."""
        problem = ""
        for _ in range(ATTEMPTS):
            try:
                with self.understood():
                    return call()
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}, {error.msg}"
                if error.code < 500:
                    raise self.error(problem) from error
            except TimeoutError as error:
                raise self.error(
                    f"hung: no answer for {self.expected.answer_timeout_s:.0f} s: restart it"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            self._wait_until_ready()
        raise self.error(f"it fails every time ({problem}): restart it")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.expected.start_timeout_s
        while True:
            if self.process and (why := self.process.ended()):
                raise self.error(why)
            try:
                self._request("/health", None, HEALTH_TIMEOUT_S)
                self._waiting = False
                return
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    raise self.error(f"{NO_VLLM} ({error})") from error
                if time.monotonic() > deadline:
                    raise self.error(
                        f"not there for {self.expected.start_timeout_s:.0f} s ({error}): start it"
                    ) from error
            if not self._waiting:  # one of the threads says it
                self._waiting = True
                say(f"waiting for the vLLM server {self.url}", sys.stderr)
            time.sleep(HEALTH_INTERVAL_S)


def _message_in(text: str) -> str:
    """Return the message in the body of an error: vLLM sends JSON, other programs send anything."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:200]
