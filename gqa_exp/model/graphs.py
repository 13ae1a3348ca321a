"""Decode steps on a GPU, recorded as CUDA graphs.

A decode step is some twenty kernels a layer, most of them of a few microseconds: launched one by one from Python, small
models wait for the launches. A graph launches all of them at once. torch.compile(mode="reduce-overhead") records graphs
too, but not of functions that write to their inputs, as a step writes to its caches, and it would copy the caches.

Shape suffixes: B batch, H query heads, L distances, T cached positions, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A step: token ids (B), the position as a tensor of one, and the bias (H, T) of the first T cached positions, to
logits (B, V)."""


class RecordedSteps:
    """The decode steps of one state, one graph for each number of cached positions that they attend to.

    A graph replays kernels on the very memory they were recorded with. So the state and its caches are kept, and
    started anew for the next batch of the same shape.

    Args:
        bias_HL: bias of all distances, as in `DecodingState`.
        batch: B.
    """

    def __init__(self, bias_HL: Tensor, batch: int) -> None:
        self.bias_HL = bias_HL
        self.capacity = bias_HL.shape[1] // 2
        self.token_B = torch.zeros(batch, dtype=torch.long, device=bias_HL.device)
        self.position = torch.zeros(1, dtype=torch.long, device=bias_HL.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.memory = torch.cuda.graph_pool_handle()

    def __call__(self, decode: Decode, token_B: Tensor, position: Tensor, end: int) -> Tensor:
        """Logits (B, V) of one step, which the next one overwrites.

        Args:
            decode: the step, to be recorded where it is not yet. All it reads beside its arguments has to stay where
                it is.
            token_B: token ids.
            position: theirs, a tensor of one.
            end: cached positions to attend to; the bias hides those behind `position`.
        """
        self.token_B.copy_(token_B)
        self.position.copy_(position)
        if end not in self.graphs:
            self.graphs[end] = self._record(functools.partial(self._step, decode, end))
        graph, logits_BV = self.graphs[end]
        graph.replay()
        return logits_BV

    def _record(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Once without recording, on a stream beside: what is compiled, chosen or allocated at first use happens there.
        # The step itself may run twice, since it writes the same to the same place.
        beside, main = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            step()
        main.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            logits_BV = step()
        return graph, logits_BV

    def _step(self, decode: Decode, end: int) -> Tensor:
        first = self.capacity - 1 - self.position
        bias_HT = self.bias_HL.index_select(1, first + torch.arange(end, device=first.device))
        return decode(self.token_B, self.position, bias_HT)
