"""One contrastive step in bounded memory: chunks of texts, their graphs kept where there is room, else recomputed.

The gradient cache (Gao et al. 2021) with a choice per chunk: the loss sees all embeddings of the step, whichever chunks
are kept, and loss and gradients are the same. Of several processes each has chunks of its own, and all embeddings meet
before the loss: every process computes the whole loss, and from it the exact gradients of its own embeddings. Knows
packs, embeddings and a closure; no objective.

Shapes: n = texts of the step, d = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from kinvec import distributed
from kinvec.batching import Pack

Embed = Callable[[Pack], Float[Tensor, "m d"]]
Loss = Callable[[Float[Tensor, "n d"]], Float[Tensor, ""]]


def backward(
    embed: Embed, chunks: Sequence[Pack], loss: Loss, keep: int, before_last: Callable[[], None] = lambda: None,
    within: Callable[[], AbstractContextManager[None]] = distributed.within_memory,
) -> float:  # fmt: skip
    """Accumulate the gradients of `loss` over the embeddings of all chunks; returns the loss.

    The first `keep` chunks keep their graphs; the others are embedded once without and once more with gradients, with
    the same dropout masks. The random state afterwards is that after one forward pass over all chunks. `chunks` are
    those of this process, and its gradients are still to be summed with those of the others; `before_last` is called
    before the last chunk's. All but the meeting of the embeddings happens `within` a context.
    """
    states: list[tuple[Tensor, Tensor | None]] = []
    vectors: list[Tensor] = []
    with within():
        for place, chunk in enumerate(chunks):
            states.append(_random_state())
            with torch.set_grad_enabled(place < keep):
                vectors.append(embed(chunk))
    after = _random_state()
    order = torch.tensor([row for chunk in chunks for row in chunk.rows], device=vectors[0].device)
    texts = int(distributed.total(len(order)))
    every = torch.zeros(texts, vectors[0].shape[1], dtype=vectors[0].dtype, device=vectors[0].device)
    every[order] = torch.cat([chunk_vectors.detach() for chunk_vectors in vectors])
    distributed.add(every).requires_grad_()  # all others' rows were zero
    with within():
        value = loss(every)
        value.backward()
        assert every.grad is not None
        gradients = every.grad[order].split([len(chunk) for chunk in chunks])
        for place in reversed(range(len(chunks))):
            if place >= keep:
                _set_random_state(states[place])
                vectors[place] = embed(chunks[place])
            if place == 0:
                before_last()
            vectors.pop().backward(gradients[place])  # popped, so that its graph is freed before the next one grows
    _set_random_state(after)
    return value.item()


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
