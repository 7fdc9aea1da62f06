"""The experts of a mixture: which ones its routers choose, and Routing Replay.

A router gives each token scores for the experts of its layer, chooses the k highest with torch.topk(), and
weighs these experts by their scores. Routing Replay (arXiv 2507.18071, section 5.3) uses the experts that
were chosen under pi_old when pi is computed.

Both happen at that one call of topk(). Inside a routed pass it is watched, and replayed by returning the
given experts together with their present scores. What a model makes of the scores is left to its own code: a
softmax before or after the choice, normalisation, a factor, biases of the choice alone. So the weights of
replayed experts are those that the present router gives them, and its gradient flows.

A layer is found by its structure: a module with a part called `experts` that knows its num_experts, as
transformers builds them. In every pass it is made sure that the experts are called with the very choice that
was watched or replayed.

Shapes: N tokens of a forward pass; L layers with experts; k experts of a token in a layer; x a prompt and y a
response of a row.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

# The experts of a row's tokens, (|x|, L, k) and (|y| - 1, L, k) small integers on the CPU. The last token of
# a response predicts nothing and is not computed. Rows of a pass that have the same prompt share its tensor.
RowExperts = tuple[torch.Tensor, torch.Tensor]

TOPK = (torch.topk, torch.Tensor.topk)
# Stands for the experts of a token for which none are given: its router chooses.
NOT_GIVEN = -1
UNKNOWN_CALL = "its experts are not called with what torch.topk() returns for each token"
# The forward pass in progress; None: there is none, or it is not routed.
_pass: "_RoutedPass | None" = None


class UnknownRouting(ValueError):
    """A model chooses its experts in a way that can be neither read nor replayed."""


@dataclass(frozen=True)
class ExpertLayer:
    """A layer with experts.

    block: chooses experts for each token, and calls `experts` with hidden states, choice (N, k) and weights.
    """

    block: nn.Module
    experts: nn.Module


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Return the layers with experts whose routing may be watched, in the order of the model's modules."""
    found = []
    for block in model.modules():
        experts = getattr(block, "experts", None)
        if isinstance(experts, nn.Module) and isinstance(getattr(experts, "num_experts", None), int):
            found.append(ExpertLayer(block, experts))
    return found


def has_experts(model_config: PreTrainedConfig) -> bool:
    """Return whether a configuration is that of a mixture of experts."""

    def says_so(settings: dict) -> bool:
        for name, value in settings.items():
            if isinstance(value, dict):
                if says_so(value):
                    return True
            elif "experts" in str(name) and isinstance(value, int) and value > 1:
                return True
        return False

    return says_so(model_config.to_dict())


def refuse_dense(model_config: PreTrainedConfig) -> None:
    """Raise a ValueError if the model is no mixture of experts."""
    if not has_experts(model_config):
        raise ValueError(
            f"--routing_replay is for mixtures of experts, and {model_config.model_type} is none: leave "
            "it out"
        )


class Routing:
    """The experts of rows of tokens, in the forward passes of one token_log_probs().

    It is no dataclass: FSDP copies the dataclasses among the arguments of a forward pass.

    Args:
        layers: those of the model.
        given: the experts that each row is to be compared with, or None for a row without.
        replays: the given experts are used. Otherwise the routers choose.
        records: keep what the routers choose.

    Attributes:
        recorded: what the routers chose for each row, if that is kept; None for a row without a response.
        choices: expert choices that were compared: of the |y| tokens that predict the response of a row with
            given experts, in all layers.
        changed: () how many of them the routers would make otherwise, on the model's device.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        given: Sequence[RowExperts | None],
        replays: bool = False,
        records: bool = False,
    ) -> None:
        self.layers, self.given, self.replays, self.records = layers, given, replays, records
        self.recorded: list[RowExperts | None] = [None] * len(given)
        self.choices = 0
        self.changed: torch.Tensor | int = 0

    def sums(self) -> dict[str, Any]:
        """What a metric needs, by the names of loss_metrics.METRIC_SUMS."""
        return {"expert_choices": self.choices, "changed_experts": self.changed}

    @contextmanager
    def one_pass(
        self,
        rows: Sequence[int],
        prompt_lengths: Sequence[int],
        predictors: Sequence[Sequence[int]],
        num_tokens: int,
        device: torch.device,
    ) -> Iterator[None]:
        """Route the forward pass inside.

        Args:
            rows: those of the pass.
            prompt_lengths: tokens of their prompts.
            predictors: for each of them, where among the N tokens of the pass those stand that predict its
                response: the prompt's last token, then the response's own but the last. Before the prompt's
                last token stands the rest of the prompt.
            num_tokens: N.

        Raises:
            UnknownRouting: the experts that the routers choose cannot be read.
        """
        places = {}  # of a row's prompt, and of its response
        for row, length, own in zip(rows, prompt_lengths, predictors, strict=True):
            if own:
                places[row] = range(own[0] + 1 - length, own[0] + 1), list(own[1:])
        given = self._given(places, num_tokens, device)
        routed = _RoutedPass(self.layers, given, self.replays, num_tokens)
        with _routed(routed):
            yield
        routed.check()
        if self.records:
            self._record(routed, places)
        if given is not None:
            self._compare(routed, places, given)

    def _given(self, places: dict, num_tokens: int, device: torch.device) -> torch.Tensor | None:
        """The given experts of a pass (N, L, k) on the device; None if no row has any."""
        given = None
        for row, (prompt, response) in places.items():
            experts = self.given[row]
            if experts is None:
                continue
            if given is None:
                given = torch.full((num_tokens, *experts[0].shape[1:]), NOT_GIVEN, dtype=torch.int64)
            if given[prompt.start, 0, 0] == NOT_GIVEN:  # a shared prompt has those of the group's first row
                given[prompt.start : prompt.stop] = experts[0].long()
            given[response] = experts[1].long()
        return None if given is None else given.to(device)

    def _record(self, routed: "_RoutedPass", places: dict) -> None:
        most = max(layer.experts.num_experts for layer in self.layers)  # type: ignore[type-var]
        dtype = torch.uint8 if most <= 256 else torch.int16
        chosen = torch.stack(routed.chosen, 1).to(dtype).cpu()  # (N, L, k)
        prompts: dict[range, torch.Tensor] = {}
        for row, (prompt, response) in places.items():
            if prompt not in prompts:
                # A copy: a view would be sent to other processes with all of the tensor that it is a part of.
                prompts[prompt] = chosen[prompt.start : prompt.stop].clone()
            self.recorded[row] = prompts[prompt], chosen[response]

    def _compare(self, routed: "_RoutedPass", places: dict, given: torch.Tensor) -> None:
        predictors = []
        for row, (prompt, response) in places.items():
            if self.given[row] is not None:
                predictors += [prompt.stop - 1, *response]
        at = torch.tensor(predictors, device=given.device)
        for layer, chosen in enumerate(routed.chosen):
            pairs = chosen[at][:, :, None] == given[at, layer][:, None]  # (tokens, k, k)
            self.changed = self.changed + (~pairs.any(2)).sum()
            self.choices += len(predictors) * chosen.shape[1]


class _RoutedPass:
    """One forward pass, which backward may compute again.

    Attributes:
        chosen: for each layer, what its router chose by itself, (N, k).
        used: for each layer, the choice with which its experts must be called.
        called: for each layer, whether they were.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        given: torch.Tensor | None,
        replays: bool,
        num_tokens: int,
    ) -> None:
        self.layers, self.given, self.replays, self.num_tokens = layers, given, replays, num_tokens
        self.chosen = [torch.empty(0)] * len(layers)
        self.used = [torch.empty(0)] * len(layers)
        self.called = [False] * len(layers)

    def choose(self, layer: int, scores: torch.Tensor, choice: Any) -> Any:
        """Return what topk() is to return in a layer: values and indices (N, k).

        scores: (N, experts), of which topk() takes the highest. choice: what it returned.
        """
        self.chosen[layer] = self.used[layer] = choice.indices
        if not self.replays or self.given is None:
            return choice
        given = self.given[:, layer]
        used = self.used[layer] = torch.where(given == NOT_GIVEN, choice.indices, given)
        return torch.return_types.topk((scores.gather(-1, used), used))

    def check(self) -> None:
        """Raise UnknownRouting unless each layer has chosen equally many experts for each token."""
        if not all(self.called):
            raise UnknownRouting(UNKNOWN_CALL)
        shapes = {tuple(chosen.shape) for chosen in self.chosen}
        if len(shapes) > 1 or next(iter(shapes))[:1] != (self.num_tokens,):
            raise UnknownRouting("its layers do not choose the same number of experts for every token")

    def check_call(self, layer: int, _experts: nn.Module, arguments: tuple) -> None:
        """Raise UnknownRouting unless the layer's experts are called with the choice that was watched."""
        if len(arguments) < 2 or arguments[1] is not self.used[layer]:
            raise UnknownRouting(UNKNOWN_CALL)
        self.called[layer] = True


class _WatchedChoice(TorchFunctionMode):
    """Watches a layer's block for the call of topk() that chooses its experts."""

    def __init__(self, routed: _RoutedPass, layer: int) -> None:
        super().__init__()
        self.routed, self.layer = routed, layer
        # Others choose groups of experts, or rank the experts of a group.
        self.shape = routed.num_tokens, routed.layers[layer].experts.num_experts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in TOPK and args and args[0].shape == self.shape:
            return self.routed.choose(self.layer, args[0], result)
        return result


@contextmanager
def _routed(routed: "_RoutedPass | None") -> Iterator[None]:
    """Route the computations of the pass's layers inside."""
    global _pass
    if routed is None:
        yield
        return
    before = _pass
    with ExitStack() as stack:
        for number, layer in enumerate(routed.layers):
            stack.enter_context(_watched(routed, number, layer.block))
            hook = layer.experts.register_forward_pre_hook(partial(routed.check_call, number))
            stack.callback(hook.remove)
        _pass = routed
        try:
            yield
        finally:
            _pass = before


@contextmanager
def _watched(routed: _RoutedPass, number: int, block: nn.Module) -> Iterator[None]:
    """Compute a layer's block under _WatchedChoice inside."""
    own, plain = "forward" in vars(block), block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _WatchedChoice(routed, number):
            return plain(*args, **kwargs)

    block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            block.forward = plain  # type: ignore[method-assign]
        else:
            del block.forward


def same_routing() -> Any:
    """Return a context in which a checkpointed layer is computed again as in the pass in progress."""
    return _routed(_pass)
