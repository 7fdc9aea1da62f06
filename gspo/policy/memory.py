"""How much GPU memory training takes, which model `auto` stands for, and what to do if a model is too large.

One calculation, `training_memory`, decides both what `auto` picks and what is refused, so the two always
agree. Nothing here needs the model hub or a GPU. A GB is 1e9 bytes.
"""

from dataclasses import dataclass, replace
from typing import Any

from gspo.policy.log_probs import MAX_FORWARD_TOKENS, MAX_LOGITS
from gspo.policy.model_cache import EMBEDDED_NAME
from gspo.policy.prompt_cache import SPARE_TOKENS
from gspo.policy.rollout import MAX_ROWS

# Bytes per parameter that stay from update to update: float32 weights and AdamW's two moments.
LASTING_BYTES = 12
GRADIENT_BYTES = 4
# The CUDA context with the libraries' workspaces: 0.5 to 1 GB, depending on the GPU.
CONTEXT_BYTES = 1e9
# The allocator loses some memory to gaps between blocks whose sizes change from pass to pass.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Shape:
    """The sizes of a model by which its memory is estimated.

    intermediate: width of a token's MLP; kv_width: width of a layer's keys, all heads together.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_width: int


# What `auto` chooses from on a GPU, largest first, so that it needs no hub to decide.
AUTO_MODELS = {
    "Qwen/Qwen2.5-7B-Instruct": Shape(7_615_616_512, 28, 3584, 18944, 152_064, 512),
    "Qwen/Qwen2.5-3B-Instruct": Shape(3_085_938_688, 36, 2048, 11008, 151_936, 256),
    "Qwen/Qwen2.5-1.5B-Instruct": Shape(1_543_714_304, 28, 1536, 8960, 151_936, 256),
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(494_032_768, 24, 896, 4864, 151_936, 128),
}
EMBEDDED_SHAPE = Shape(134_515_008, 30, 576, 1536, 49_152, 192)
# --max_length is not advised to be shorter than this: most prompts would leave no room for a response.
SHORTEST_ADVICE = 256


@dataclass(frozen=True)
class Workload:
    """The settings of a training run on which its memory depends. The defaults are those of a run.

    updated_rows: responses of an optimizer update; sampled_rows: responses sampled at a time. Both are per
    process. reference: a second model is kept for the KL term.
    """

    micro_batch_tokens: int = 4096
    max_length: int = 512
    updated_rows: int = 8
    sampled_rows: int = MAX_ROWS
    reference: bool = False
    gradient_checkpointing: bool = False
    bfloat16: bool = True

    @property
    def pass_tokens(self) -> int:
        """The most tokens of a forward pass: it takes one row at least, and no more than an update has."""
        limit = min(self.micro_batch_tokens, MAX_FORWARD_TOKENS, self.updated_rows * self.max_length)
        return max(limit, self.max_length)


def shape_of(config: Any, parameters: int) -> Shape:
    """Read the sizes of a model from its transformers configuration; guess those that it does not have."""
    config = config.get_text_config(decoder=True)
    layers = _size(config, "num_hidden_layers") or 32
    hidden = _size(config, "hidden_size") or int((parameters / (12 * layers)) ** 0.5)
    heads = _size(config, "num_attention_heads") or 1
    intermediate = _size(config, "intermediate_size") or 4 * hidden
    # In a mixture of experts, a token goes through this many.
    experts = _size(config, "num_experts_per_tok")
    if experts:
        intermediate = experts * (_size(config, "moe_intermediate_size") or intermediate)
        intermediate += _size(config, "shared_expert_intermediate_size") or 0
    head_width = _size(config, "head_dim") or hidden // heads
    kv_heads = _size(config, "num_key_value_heads") or heads
    vocabulary = _size(config, "vocab_size") or 0
    return Shape(parameters, layers, hidden, intermediate, vocabulary, kv_heads * head_width)


def _size(config: Any, name: str) -> int | None:
    """A size of the configuration, the largest where layers differ; None if it has none."""
    try:
        value = getattr(config, name, None)
    except Exception:  # some configurations raise where layers differ
        return None
    if isinstance(value, list | tuple):
        value = max(value, default=None)
    return value if isinstance(value, int) else None


def training_memory(shape: Shape, work: Workload) -> dict[str, float]:
    """Estimate the peak memory of training all weights with AdamW on one GPU, by part.

    An update needs 18 bytes per parameter (float32 weights, gradients and two moments; the bfloat16 copies
    that autograd keeps), and the activations of one forward pass. Sampling needs no gradients and no
    activations, but a cache of keys and values. The two do not coincide, and the larger is the peak.
    tests/policy/test_memory.py compares this with the tensors that live during real updates.

    Returns:
        What each part is, and its bytes. Their sum is the peak.
    """
    compute = 2 if work.bfloat16 else 4  # bytes per number in matrix products
    copies = 2 if work.bfloat16 else 0  # bytes per parameter
    tokens = work.pass_tokens
    # Autograd keeps a layer's residual stream and normalised states in float32 (16 bytes x hidden).
    # In the compute type, it keeps what the matrix products and attention read: 7 x hidden, 4 x intermediate.
    layer = 16 * shape.hidden + compute * (7 * shape.hidden + 4 * shape.intermediate)
    if work.gradient_checkpointing:  # the input of each layer, and one layer that is being recomputed
        activations = tokens * (shape.layers * 4 * shape.hidden + layer)
    else:
        activations = tokens * shape.layers * layer
    # A chunk of logits with its softmax in float32; the output layer's gradient before it is added.
    activations += 12 * min(tokens * shape.vocabulary, MAX_LOGITS)
    activations += (4 + compute) * shape.vocabulary * shape.hidden

    rows = work.sampled_rows
    cache = rows * (work.max_length + SPARE_TOKENS) * shape.layers * 2 * shape.kv_width * compute
    cache += 16 * rows * shape.vocabulary  # logits, their softmax, and the sums by which a token is drawn

    named = "moments and bfloat16 copies" if work.bfloat16 else "moments"
    update = {
        f"weights, gradients, {named}": (LASTING_BYTES + GRADIENT_BYTES + copies) * shape.parameters,
        f"activations of {tokens} tokens": activations,
    }
    sampling = {
        f"weights, {named}": (LASTING_BYTES + copies) * shape.parameters,
        f"keys and values of {rows} responses": cache,
    }
    parts = max(update, sampling, key=lambda phase: sum(phase.values()))
    reserve = CONTEXT_BYTES + FRAGMENTATION * max(activations, cache)
    if work.reference:
        parts |= {"the starting model": 4 * shape.parameters}
    return parts | {"reserve": reserve}


def fits(shape: Shape, work: Workload, gpu_bytes: float) -> bool:
    """Return whether training fits a GPU with this much memory."""
    return sum(training_memory(shape, work).values()) <= gpu_bytes


def auto_model_name(gpu_bytes: float, work: Workload) -> str:
    """Return the model that `auto` stands for on a GPU: the largest that fits, else the embedded one."""
    fitting = (name for name, shape in AUTO_MODELS.items() if fits(shape, work, gpu_bytes))
    return next(fitting, EMBEDDED_NAME)


def refuse_too_large(name: str, shape: Shape, work: Workload, gpu_bytes: float) -> None:
    """Refuse a model whose training does not fit a GPU.

    Raises:
        ValueError: it does not fit. The message is one line: what is needed and by what part, what there is,
            and which flags would make it fit.
    """
    if fits(shape, work, gpu_bytes):
        return
    parts = training_memory(shape, work)
    sizes = ", ".join(f"{size / 1e9:.1f} GB {part}" for part, size in parts.items())
    raise ValueError(
        f"--model_name {name}: training needs {sum(parts.values()) / 1e9:.1f} GB of GPU memory ({sizes}), "
        f"this GPU has {gpu_bytes / 1e9:.1f} GB; it fits with {' or '.join(remedies(shape, work, gpu_bytes))}"
    )


def remedies(shape: Shape, work: Workload, gpu_bytes: float) -> list[str]:
    """Return the flags that make training fit, each as it is typed.

    Each one suffices by itself. Only if none does, two are named together. A smaller model comes last, or the
    CPU if not even the embedded model fits.
    """
    shorter_passes = [
        {"micro_batch_tokens": tokens} for tokens in _halved(work.pass_tokens, least=work.max_length)
    ]
    checkpointing = [] if work.gradient_checkpointing else [{"gradient_checkpointing": True}]
    shorter_rows = [{"max_length": length} for length in _halved(work.max_length, least=SHORTEST_ADVICE)]
    both = [one | two for one in checkpointing for two in shorter_passes]
    found: list[str] = []
    for changes in (shorter_passes, checkpointing, shorter_rows, both):
        fitting = [change for change in changes if fits(shape, replace(work, **change), gpu_bytes)]
        if fitting and not (changes is both and found):
            found.append(_as_flags(fitting[0]))
    smaller = auto_model_name(gpu_bytes, work)
    if smaller != EMBEDDED_NAME or fits(EMBEDDED_SHAPE, work, gpu_bytes):
        return [*found, f"--model_name {smaller}"]
    return found or ["--device cpu"]


def _halved(start: int, least: int) -> list[int]:
    """Return start / 2, start / 4 and so on, and last the least itself; nothing if start is not above it."""
    values = []
    while start > least:
        start = max(start // 2, least)
        values.append(start)
    return values


def _as_flags(settings: dict[str, Any]) -> str:
    """Return settings as they are typed."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in settings.items())
