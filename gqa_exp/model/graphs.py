"""Decode steps on a GPU, recorded as CUDA graphs.

A decode step is some twenty kernels a layer, most of them of a few microseconds: launched one by one from Python, small
models wait for the launches. A graph launches all of them at once. torch.compile(mode="reduce-overhead") records graphs
too, but not of functions that write to their inputs, as a step writes to its caches, and it would copy the caches.

Shape suffixes: B batch, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
"""Token ids (B), and their position as a tensor of one, to logits (B, V)."""


class RecordedSteps:
    """The decode steps of one state, one graph for each number of cached positions that they attend to.

    A graph replays kernels on the very memory they were recorded with. So the state and its caches are kept, and
    started anew for the next batch of the same shape.

    Args:
        batch: B.
        device: of the model.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.token_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, token_B: Tensor, position: int, end: int) -> Tensor:
        """Logits (B, V), which a later step overwrites.

        Args:
            step: what to record where it is not yet; not kept, since it holds the state that holds these. All it reads
                beside its arguments has to stay where it is.
            token_B: token ids.
            position: theirs.
            end: cached positions that the step attends to.
        """
        self.token_B.copy_(token_B)
        self.position.fill_(position)
        if end not in self.graphs:
            self.graphs[end] = self._record(step)
        graph, logits_BV = self.graphs[end]
        graph.replay()
        return logits_BV

    def _record(self, step: Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Once without recording, on a stream beside: what is compiled, chosen or allocated at first use happens there.
        # The step itself may run twice, since it writes the same to the same place.
        beside, main = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            step(self.token_B, self.position)
        main.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits_BV = step(self.token_B, self.position)
        return graph, logits_BV
