"""Methods that vLLM adds to its worker, so that the engine of vllm_engine.py can load weights and ask.

This file is imported by the server, in vLLM's own environment. It imports nothing of this toolkit and, at the
top, nothing of vLLM. The server gets it by

    PYTHONPATH=<this repository> ... --worker-extension-cls gspo.policy.vllm_extension.PolicyWorker

and the engine calls the methods through POST /collective_rpc. A reload that fails half-way leaves vLLM 0.32
with a model that ends the server at the next request, so mistakes that can be foreseen are returned before.
"""

from pathlib import Path
from typing import Any

# Settings by which the engine sees that a server has another model than the trainer. They have these names in
# the model's configuration.
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


class PolicyWorker:
    """Methods of the worker. vLLM refuses names that its worker has already."""

    vllm_config: Any
    model_config: Any
    reload_weights: Any
    get_model: Any

    def describe_policy(self) -> dict[str, Any]:
        """Return the model's shape, and the settings that log-probabilities depend on."""
        config = self.model_config.hf_text_config
        on_cpu = self.vllm_config.device_config.device_type == "cpu"
        return {
            "shape": {name: getattr(config, name, None) for name in SHAPE},
            "logprobs_mode": str(self.model_config.logprobs_mode),
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            # Chunked prefill computes a prompt in parts, and takes back what it drew after all but the last.
            # vLLM 0.32 cannot take back from a CPU's random generator: it ends with "does not use offset".
            "dies_of_seeds": on_cpu and self.vllm_config.scheduler_config.enable_chunked_prefill,
        }

    def load_policy(self, folder: str) -> dict[str, Any]:
        """Take the weights of a folder. Returns {"error": why not, or None}."""
        if not list(Path(folder).glob("*.safetensors")):
            return {"error": f"the server finds no weights in {folder}: is the folder shared with it?"}
        self.reload_weights(weights_path=folder)
        _rebuild_output_layers(self.get_model())
        return {"error": None}


def _rebuild_output_layers(model: Any) -> None:
    """On a CPU, vLLM computes logits with a copy of the output layer's weights: make the copy again.

    reload_weights() makes all other copies again, but not this one if the weights are the embedding's.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
