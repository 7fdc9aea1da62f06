"""A packed row: groups of one prompt and its responses, every token once, nothing padded.

Attention needs to know which tokens of the row belong together. A kernel for padded rows takes `Rows`, which
pad the packed states and undo it. A kernel for rows of any length takes `Segments` of the packed states.

All indices are computed as lists in Python. Nothing here reads a value out of a tensor, so it works on fake
tensors, which have none, and never makes the CPU wait for a GPU.

Shapes: N packed tokens; R groups of one prompt and at most G responses each; T positions of a padded response
(or of any padded row), P of a padded prompt; D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch


class Rows:
    """Rows of a packed row's tokens, R groups of G rows, and how to pad them to T positions and back.

    Attributes:
        shape: (R, G, T).
        padded_indices: (n,), where the n tokens stand among the R * G * T padded positions.
        packed_indices: (n,), where the same tokens stand in the packed row.
        padding_indices: the padded positions that hold no token.
    """

    def __init__(self, groups: Sequence[Sequence[range]], device: torch.device) -> None:
        """Args: groups: for each group and each of its rows, the packed indices of its tokens."""
        size = max(map(len, groups))
        length = max((len(row) for group in groups for row in group), default=0)
        self.shape = (len(groups), size, length)
        packed: list[int] = []
        padded: list[int] = []
        padding: list[int] = []
        sources: list[int] = []  # which packed token to copy to each padded position; for padding any will do
        for group in groups:
            for row in [*group, *[range(0)] * (size - len(group))]:
                start, stop = len(sources), len(sources) + len(row)
                packed += row
                padded += range(start, stop)
                padding += range(stop, start + length)
                sources += [*row, *[0] * (length - len(row))]
        self.packed_indices = torch.tensor(packed, dtype=torch.long, device=device)
        self.padded_indices = torch.tensor(padded, dtype=torch.long, device=device)
        self.padding_indices = torch.tensor(padding, dtype=torch.long, device=device)
        self._source_indices = torch.tensor(sources, dtype=torch.long, device=device)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """Copy packed states (N, heads, D) to padded ones (R * G * T, heads, D), with 0 for padding."""
        padded = packed.index_select(0, self._source_indices)
        if len(self.padding_indices):
            padded.index_fill_(0, self.padding_indices, 0.0)
        return padded

    def unpad(self, padded: torch.Tensor, packed: torch.Tensor) -> None:
        """Copy padded states (R * G * T, heads, D) into packed ones (N, heads, D), in place."""
        if len(self.padding_indices):
            padded = padded.index_select(0, self.padded_indices)
        packed.index_copy_(0, self.packed_indices, padded.to(packed.dtype))

    def by_row(self, padded: torch.Tensor) -> torch.Tensor:
        """View (R * G * T, heads, D) as (R * G, heads, T, D): a row attends by itself."""
        num_groups, size, length = self.shape
        return padded.view(num_groups * size, length, *padded.shape[1:]).transpose(1, 2)

    def by_group(self, padded: torch.Tensor) -> torch.Tensor:
        """View (R * G * T, heads, D) as (R, heads, G * T, D): the rows of a group attend together."""
        num_groups, size, length = self.shape
        return padded.view(num_groups, size * length, *padded.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class Segments:
    """Segments of queries, each of which attends to a segment of keys; no segment is empty.

    Attributes:
        query_indices, key_indices: where the queries and the keys of all segments stand in the packed row;
            None: they are the packed row itself.
        query_bounds, key_bounds: (segments + 1,) int32, where each segment begins among the queries and among
            the keys, and last where they end.
        longest_query, longest_key: tokens of the longest segment.
    """

    query_indices: torch.Tensor | None
    key_indices: torch.Tensor | None
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    longest_query: int
    longest_key: int


def _segments(
    queries: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    device: torch.device,
    all_queries: bool = False,
    all_keys: bool = False,
) -> Segments:
    """Return the Segments of these packed indices.

    Args:
        queries, keys: for each segment, the packed indices of its queries and of its keys.
        all_queries, all_keys: they are the whole packed row in its order.
    """

    def indices(segments: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([i for segment in segments for i in segment], dtype=torch.long, device=device)

    def bounds(segments: Sequence[Sequence[int]]) -> torch.Tensor:
        ends = accumulate(map(len, segments), initial=0)
        return torch.tensor(list(ends), dtype=torch.int32, device=device)

    return Segments(
        query_indices=None if all_queries else indices(queries),
        key_indices=None if all_keys else indices(keys),
        query_bounds=bounds(queries),
        key_bounds=bounds(keys),
        longest_query=max(map(len, queries)),
        longest_key=max(map(len, keys)),
    )


class PackedGroups:
    """Groups of one prompt and its responses, as one packed row of token ids.

    Attributes:
        input_ids, position_ids: (1, N).
        predictors: for each group and each of its responses, the packed indices of the tokens whose hidden
            states predict the response's tokens and the one after them: the prompt's last token, then the
            response's own.
        prompts, responses: the Rows of each, with one prompt per group.
    """

    def __init__(
        self, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device
    ) -> None:
        """Args: groups: the token ids of each prompt, and of its responses; a response may be empty."""
        ids: list[int] = []
        positions: list[int] = []
        self._prompts: list[range] = []  # the packed indices of each prompt
        self._responses: list[list[range]] = []  # and of its responses
        self.predictors: list[list[list[int]]] = []
        for prompt, group_responses in groups:
            self._prompts.append(range(len(ids), len(ids) + len(prompt)))
            ids += prompt
            positions += range(len(prompt))
            last_of_prompt = len(ids) - 1
            self._responses.append([])
            self.predictors.append([])
            for response in group_responses:
                own = range(len(ids), len(ids) + len(response))
                ids += response
                positions += range(len(prompt), len(prompt) + len(response))
                self._responses[-1].append(own)
                self.predictors[-1].append([last_of_prompt, *own])
        self._device = device
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self._masks: dict[int | None, torch.Tensor] = {}  # by window
        self._windows: dict[int, Segments] = {}

    @cached_property
    def prompts(self) -> Rows:
        return Rows([[prompt] for prompt in self._prompts], self._device)

    @cached_property
    def responses(self) -> Rows:
        return Rows(self._responses, self._device)

    def prompt_mask(self, window: int | None) -> torch.Tensor | None:
        """Return what to add to the scores of response tokens over their prompts: 0 if visible, else -inf.

        The mask is made once and serves all layers that have the same window.

        Args:
            window: how many tokens back a token sees, itself included; None: all of them.

        Returns:
            (R, 1, 1, P), or (R, 1, G * T, P) with a window; None where every token sees everything.
        """
        prompt_lengths = [len(prompt) for prompt in self._prompts]
        if window is None and len(set(prompt_lengths)) == 1:
            return None
        if window not in self._masks:
            _, size, length = self.responses.shape
            key_position = torch.arange(self.prompts.shape[2], device=self._device)  # (P,)
            lengths = torch.tensor(prompt_lengths, device=self._device)[:, None, None]  # (R, 1, 1)
            hidden = key_position >= lengths  # (R, 1, P): padding
            if window is not None:
                query_position = lengths + torch.arange(length, device=self._device)[:, None]  # (R, T, 1)
                hidden = hidden | (query_position - key_position >= window)  # (R, T, P)
                hidden = hidden.repeat(1, size, 1)  # (R, G * T, P), the same for each response of a group
            self._masks[window] = additive_mask(hidden)[:, None]
        return self._masks[window]

    @cached_property
    def own_segments(self) -> Segments:
        """Every prompt and every response to itself."""
        rows = [
            row
            for prompt, responses in zip(self._prompts, self._responses, strict=True)
            for row in (prompt, *responses)
            if len(row)
        ]
        return _segments(rows, rows, self._device, all_queries=True, all_keys=True)

    @cached_property
    def shared_segments(self) -> Segments | None:
        """All responses of a group to their prompt; None if every response is empty."""
        queries, keys = [], []
        for prompt, responses in zip(self._prompts, self._responses, strict=True):
            of_group = [i for response in responses for i in response]
            if of_group:
                queries.append(of_group)
                keys.append(prompt)
        return _segments(queries, keys, self._device) if queries else None

    def window_segments(self, window: int) -> Segments:
        """Every prompt to itself, and every response to the end of its prompt that it can see, and to itself.

        Args:
            window: how many tokens back a token sees, itself included.
        """
        if window not in self._windows:
            queries: list[Sequence[int]] = []
            keys: list[Sequence[int]] = []
            for prompt, responses in zip(self._prompts, self._responses, strict=True):
                queries.append(prompt)
                keys.append(prompt)
                visible = prompt[max(0, len(prompt) - (window - 1)) :]  # to a response's first token
                for response in responses:
                    if len(response):
                        queries.append(response)
                        keys.append([*visible, *response])
            self._windows[window] = _segments(queries, keys, self._device, all_queries=True)
        return self._windows[window]


def additive_mask(hidden: torch.Tensor) -> torch.Tensor:
    """Return 0 where `hidden` is False and -inf where it is True."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
