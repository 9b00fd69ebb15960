"""Several processes as one, started by `torchrun`; in a single process every function here does next to nothing.

Two ways of working together. In the training step every process does the same and `add` brings together what each has
computed: all embeddings, then all gradients. Everywhere else rank 0 works as if it were alone, reads and writes files
and decides, while the others help it with what it shares out: `led` and `shared`. So nothing but the training step has
to be the same everywhere, and only rank 0 writes.

Shapes: W = processes (ranks).
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinvec import console
from kinvec.machine import out_of_memory

PATIENCE = timedelta(hours=12)  # helpers wait as long as rank 0 is busy; who dies is noticed by the closed connection
CPU = torch.device("cpu")

Given = TypeVar("Given")
Made = TypeVar("Made")


# --- Who is who -------------------------------------------------------------------------------------------------------


_beside: Any = None


def start() -> None:
    """Join the others, if `torchrun` started several. Ranks after 0 say and print nothing, errors aside."""
    global _beside
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, rank, world, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    # The launcher's store outlives a restart, and would tell the new processes where the dead ones were.
    fresh = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=world, timeout=PATIENCE)
    _beside = dist.new_group(backend="gloo", timeout=PATIENCE)
    atexit.register(_leave)
    if rank:
        console.silent = True
        sys.stdout = open(os.devnull, "w")


def _leave() -> None:
    """End gloo's threads before Python ends: one that lets go of a tensor afterwards would abort the process."""
    global _beside
    _beside = None
    dist.destroy_process_group()
    time.sleep(0.05)  # to let go they need the interpreter's lock, which nobody else gives them now


def world() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def here() -> int:
    """How many of them share this machine, and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world() > 1 else 1


# --- In step ----------------------------------------------------------------------------------------------------------


def add(tensor: Tensor) -> Tensor:
    """The tensor's sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def total(number: int | float) -> float:
    """The sum of a number over all processes."""
    return float(add(torch.tensor(number, dtype=torch.float64)))


def least(number: int | float) -> float:
    """The smallest of a number over all processes."""
    found = torch.tensor(number, dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return float(found)


class OutOfMemory(torch.OutOfMemoryError):
    """Memory has ended in one process, and all know it."""


@contextmanager
def within_memory() -> Iterator[None]:
    """Where memory ends in the block of one process, all raise `OutOfMemory` after it, so that none waits for another.

    In the block itself none may wait for others.
    """
    if world() == 1:
        yield
        return
    ended = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ended = out_of_memory(error)
        if not ended:
            raise
    if total(ended):
        raise OutOfMemory("out of memory in one of several processes")


def everyones(own: Made) -> list[Made]:
    """What every process has, in the order of their numbers; it can be pickled."""
    if world() == 1:
        return [own]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, own)
    return found


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in one reduction for each type of number.

    Sharded parameters are left out: theirs are summed where they are scattered. The loss is of the whole batch, so a
    sum it is, no mean. Every process has run the same graph, and a parameter without a gradient has none anywhere.
    """
    if world() == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None and not sharded(parameter):
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        whole = add(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, summed in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier(beside())


def beside() -> Any:
    """The processes as a group of their own, for what is written while the training goes on."""
    return _beside


def in_turn(work: Callable[[], Made]) -> Made:
    """What `work` gives, on rank 0 before the others: they find the caches that it has made."""
    if rank():
        wait()
    made = work()
    if not rank():
        wait()
    return made


# --- Led by rank 0 ----------------------------------------------------------------------------------------------------

leading = False  # whether others wait to help
model: Any = None  # what all of them hold, while rank 0 leads


def led(work: Callable[[], Made], held: Any = None) -> Made:
    """What `work` gives on rank 0, on every rank. Others help with what rank 0 shares out meanwhile.

    `held` is a model that all have, in the same state; the helpers find it as `distributed.model`. Where rank 0 fails,
    the others end.
    """
    global leading, model
    if world() == 1 or leading:
        return work()
    before, model = model, held
    try:
        if rank():
            return _help()
        leading = True
        try:
            made = work()
        except BaseException:
            _tell("failed", None)
            raise
        _tell("made", made)
        return made
    finally:
        leading, model = False, before


def helpers(parts: int) -> int:
    """How many processes do work that is led and falls into so many parts, this one counted."""
    return min(world(), max(parts, 1)) if leading else 1


def shared(
    compute: Callable[[Given], Made], parts: Sequence[Given], helped: Callable[[Given], Made] | None
) -> Iterator[Made]:
    """`compute` of every part, in order. While rank 0 leads, others do their share by `helped`, which can be pickled.

    All do the same number of parts, some the last one twice: a model whose weights are spread needs all of them for
    each. Without `helped`, or nobody to help, the parts are computed as they are asked for.
    """
    if not leading or helped is None or not parts:
        yield from map(compute, parts)
        return
    count = world()
    padded = [*parts, *[parts[-1]] * (-len(parts) % count)]
    _tell("help", (helped, padded))
    own = [compute(part) for part in padded[::count]]
    made: list[Any] = [None] * count
    dist.gather_object(own, made)
    yield from (made[place % count][place // count] for place in range(len(parts)))


def _help() -> Any:
    """Do a share of whatever rank 0 shares out, until it says that it is done; what it made."""
    while True:
        what, given = _heard()
        if what == "made":
            return given
        if what == "failed":
            raise SystemExit(1)  # rank 0 says why
        helped, parts = given
        dist.gather_object([helped(part) for part in parts[rank() :: world()]], None)


def _tell(what: str, given: Any) -> None:
    dist.broadcast_object_list([what, given], src=0, device=CPU)


def _heard() -> tuple[str, Any]:
    heard: list[Any] = [None, None]
    dist.broadcast_object_list(heard, src=0, device=CPU)
    return heard[0], heard[1]


# --- Weights spread over the processes --------------------------------------------------------------------------------


def sharded(parameter: Tensor) -> bool:
    """Whether each process holds a part of it."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts, on every process."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(module: nn.Module, layers: Iterable[nn.Module], over: str) -> None:
    """Spread a module's weights (FSDP2, Zhao et al. 2023): over all processes, or over those of each machine.

    `over` is `all`, or `machine` (HSDP: every machine holds the whole model). `layers` are gathered one at a time.
    Gradients are summed, not averaged.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (world(),) if over == "all" else (world() // here(), here())
    mesh = dist.init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo scales no sums


def scatter_gradients(module: nn.Module, now: bool) -> None:
    """Whether the gradients of spread weights are summed and scattered by the next backward pass, or kept for later."""
    if is_spread(module):
        module.set_requires_gradient_sync(now)  # type: ignore[operator]


def is_spread(module: nn.Module) -> bool:
    """Whether each process holds a part of the module's weights."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def let_go(module: nn.Module) -> None:
    """Let go of weights that a forward pass has gathered and no backward pass has spread again.

    Until then the module's parameters are the gathered ones, of which an optimizer knows nothing.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gather(spread_out: nn.Module, into: nn.Module) -> None:
    """Copy the weights of a spread module into the one that it was made from, on every process."""
    with torch.no_grad():
        for part, weight in zip(spread_out.parameters(), into.parameters(), strict=True):
            weight.copy_(whole(part))
