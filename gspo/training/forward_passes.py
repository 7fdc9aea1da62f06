"""Log-probabilities of samples, in forward passes that fit the memory, shared among the processes."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from gspo.policy.expert_routing import (
    ExpertLayer,
    Routing,
    RowExperts,
    UnknownRouting,
    expert_layers,
    refuse_dense,
)
from gspo.policy.log_probs import MAX_FORWARD_TOKENS, micro_batches, token_log_probs
from gspo.policy.out_of_memory import is_out_of_memory
from gspo.policy.sharded_model import call, is_sharded
from gspo.printing import say
from gspo.training.config import GSPOConfig
from gspo.training.processes import Processes
from gspo.training.rollout_batch import Sample

Result = TypeVar("Result")
# Tokens per forward pass where no plan of the GPU's memory decides otherwise.
PASS_TOKENS = 4096


class ForwardPasses:
    """Forward passes of at most so many tokens, which are halved whenever memory runs out.

    Equal samples run in equal shapes, with and without gradients, and equal shapes give equal bits. So the
    importance ratio of an unchanged policy is exactly 1.
    """

    def __init__(self, config: GSPOConfig, processes: Processes, policy: Any = None):
        """policy: the model of the updates; None: one without experts.

        Raises:
            ValueError: its routing is to be replayed, and cannot be.
        """
        self.config, self.processes = config, processes
        self.halvings = 0
        self.expert_layers = self._known_expert_layers(policy)  # their routing is measured and replayed

    def _known_expert_layers(self, model: Any) -> list[ExpertLayer]:
        """The model's layers with experts, if a short pass shows that their routing is known."""
        if model is None:
            return []
        if self.config.routing_replay:
            refuse_dense(model.config)
        layers = expert_layers(model)
        unknown = "none of its layers has experts and a router that are known here"
        if layers:
            routing = Routing(layers, [None], records=True)
            try:
                with torch.no_grad(), self.compute_type():
                    call(model, token_log_probs, [[0]], [[0, 0]], 1.0, routing)
                return layers
            except UnknownRouting as error:
                unknown = str(error)
        if self.config.routing_replay:
            raise ValueError(f"--routing_replay: {model.config.model_type} cannot be replayed: {unknown}")
        return []

    @property
    def max_tokens(self) -> int:
        """Tokens per forward pass."""
        tokens = self.config.micro_batch_tokens
        assert tokens is not None  # resolve() has decided it
        if self.processes.count > 1:  # token_log_probs() must not cut a pass, of which processes wait for all
            tokens = min(tokens, MAX_FORWARD_TOKENS)
        return tokens >> self.halvings

    def micro_batches(self, model: Any, samples: Sequence[Sample]) -> list[list[int]]:
        """The rows of this process's share of the samples with a signal, by forward pass.

        A pass without rows is one of empty_pass(). Whole groups are dealt to the processes, since each part
        of a group would need a pass over its prompt.

        A sample without an advantage has a gradient of exactly 0. On problems much too easy or too hard for
        the model, which half of all groups often are, leaving them out halves the work.
        """
        shares = deal_groups(samples, self.config.group_size, self.processes.count)
        split = [self._split(model, samples, share) for share in shares]
        own = split[self.processes.rank]
        if is_sharded(model):  # a pass waits for all processes: each makes as many
            own += [[]] * (max(map(len, split)) - len(own))
        return own

    def _split(self, model: Any, samples: Sequence[Sample], share: Sequence[int]) -> list[list[int]]:
        prompts = [samples[row].rollout.prompt_ids for row in share]
        responses = [samples[row].rollout.response_ids for row in share]
        split = micro_batches(model, prompts, responses, self.max_tokens)
        return [[share[i] for i in indices] for indices in split]

    def log_probs(
        self, model: Any, samples: Sequence[Sample], routing: Routing | None = None
    ) -> list[torch.Tensor]:
        """One forward pass: log-probabilities (|y|,) of each sample's response, differentiable."""
        prompts = [sample.rollout.prompt_ids for sample in samples]
        responses = [sample.rollout.response_ids for sample in samples]
        with self.compute_type():
            return call(model, token_log_probs, prompts, responses, self.config.temperature, routing)

    def updated_log_probs(
        self, model: Any, samples: Sequence[Sample]
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """log_probs() in an update, with the experts of pi_old if they are replayed.

        Returns: also the sums for routing_changed, unread, if that is measured.
        """
        experts = [sample.experts for sample in samples]
        if not self.config.routing_replay and not any(experts):
            return self.log_probs(model, samples), {}
        # Without experts the policy still is pi_old, and its routers choose them.
        routing = Routing(self.expert_layers, experts, replays=self.config.routing_replay)
        return self.log_probs(model, samples, routing), routing.sums()

    def empty_pass(self, model: Any) -> torch.Tensor:
        """One forward pass of nothing, as others make one. Returns 0, differentiable."""
        with self.compute_type():
            return 0.0 * call(model, token_log_probs, [[0]], [[0]])[0].sum()

    def old_log_probs(
        self, policy: Any, minibatches: Sequence[Sequence[Sample]], measures_routing: bool
    ) -> list[tuple[Sample, torch.Tensor]]:
        """all_log_probs() of the policy while it is pi_old; records its experts if anything needs them."""
        needs_experts = measures_routing or self.config.routing_replay
        return self.all_log_probs(policy, minibatches, needs_experts and bool(self.expert_layers))

    def all_log_probs(
        self, model: Any, minibatches: Sequence[Sequence[Sample]], records_experts: bool = False
    ) -> list[tuple[Sample, torch.Tensor]]:
        """Log-probabilities (|y|,) on the CPU, without gradients, of all samples with a signal.

        They are computed in the very forward passes that the updates on these minibatches run.

        records_experts: set the samples' experts to those that the model's routers choose.
        """

        def own_share() -> list[tuple[int, int, torch.Tensor, RowExperts | None]]:
            computed: list[tuple[int, int, torch.Tensor, RowExperts | None]] = []
            with torch.no_grad(), self.compute_type():  # entered once, so that the weights are cast once
                for number, samples in enumerate(minibatches):
                    for rows in self.micro_batches(model, samples):
                        if not rows:
                            self.empty_pass(model)
                            continue
                        chosen = [samples[row] for row in rows]
                        routing = None
                        if records_experts:
                            routing = Routing(self.expert_layers, [None] * len(rows), records=True)
                        log_probs = to_cpu(self.log_probs(model, chosen, routing))
                        experts = [None] * len(rows) if routing is None else routing.recorded
                        computed += zip([number] * len(rows), rows, log_probs, experts, strict=True)
            return computed

        everything = [sample for samples in minibatches for sample in samples]
        gathered = self.processes.gather(self.retry(own_share, everything))
        if records_experts:
            for number, row, _, experts in gathered:
                minibatches[number][row].experts = experts
        return [(minibatches[number][row], log_probs) for number, row, log_probs, _ in gathered]

    def compute_type(self) -> torch.autocast:
        return compute_type(self.config, self.processes.device.type)

    def retry(self, work: Callable[[], Result], samples: Sequence[Sample]) -> Result:
        """Return work(); repeat it with half the tokens per pass as long as it runs out of memory.

        Collective: all processes repeat it if one has to. With sharded weights they wait for one another
        within it, so that one process that has run out of memory ends them all.

        The gradient stays the same but for rounding. In bfloat16 that rounding adds noise to the ratios of
        the rollout batch in progress, whose log pi_old was computed in other shapes.

        Args:
            work: may be repeated.
            samples: those it works on. A pass cannot be shorter than the longest of them.
        """
        longest = max((len(s.rollout.prompt_ids) + s.num_tokens for s in samples), default=0)
        while True:
            result = None
            try:
                result = work()
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.max_tokens <= longest:
                    raise
                if self.config.shard == "full" and self.processes.count > 1:
                    tokens = self.max_tokens // 2
                    say(f"out of memory: --resume with --micro_batch_tokens {tokens}", sys.stderr)
                    raise
            # After the handler, which holds the failed attempt's tensors.
            if not self.processes.any(result is None):
                assert result is not None
                return result
            self.halvings += 1
            torch.cuda.empty_cache()
            if self.processes.is_main:
                say(
                    f"out of memory: from now on {self.max_tokens} tokens per forward pass "
                    "(--micro_batch_tokens)",
                    sys.stderr,
                )


def deal_groups(samples: Sequence[Sample], group_size: int, num_shares: int) -> list[list[int]]:
    """Deal the rows of samples with a signal into shares of about as many tokens, whole groups each.

    samples: whole groups, contiguous.
    """
    groups: list[tuple[int, list[int]]] = []  # tokens, rows
    for start in range(0, len(samples), group_size):
        rows = [i for i in range(start, min(start + group_size, len(samples))) if samples[i].has_signal]
        if rows:
            tokens = len(samples[start].rollout.prompt_ids) + sum(samples[row].num_tokens for row in rows)
            groups.append((tokens, rows))
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for tokens, rows in sorted(groups, key=lambda group: -group[0]):
        lightest = loads.index(min(loads))
        loads[lightest] += tokens
        shares[lightest] += rows
    return [sorted(share) for share in shares]


def compute_type(config: GSPOConfig, device_type: str) -> torch.autocast:
    """bfloat16 matrix products over the weights, or float32 throughout.

    This is torch.autocast rather than accelerate's, which is fixed once per process, because trainers of both
    types may be compared in one process.
    """
    return torch.autocast(device_type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def sampling_type(config: GSPOConfig, device_type: str) -> torch.autocast:
    """The same for sampling with the policy itself, which may be coarser (--rollout_dtype)."""
    return torch.autocast(device_type, torch.bfloat16, enabled=config.sampling_dtype == "bfloat16")


def to_cpu(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Detached tensors (|y|,) on the CPU, in one transfer."""
    return list(torch.cat([row.detach() for row in rows]).cpu().split([len(row) for row in rows]))
