"""Several processes as `torchrun` would start them, forked from the server that has done the imports."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on a single machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _call(function: Callable[..., None], given: dict[str, str], output: Path, args: tuple[Any, ...]) -> None:
    with open(output, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(given)
    import torch

    from kinvec import distributed

    torch.set_num_threads(1)
    distributed.start()
    function(*args)


def run(world: int, function: Callable[..., None], *args: Any, output: Path) -> None:
    """Call `function(*args)` in `world` processes that know each other; fails with what they said if one fails."""
    port, said = free_port(), [output.with_name(f"{output.name}-{rank}") for rank in range(world)]
    processes = [
        command_line.FORKS.Process(target=_call, args=(function, environment(rank, world, port), said[rank], args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(command_line.WAIT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    told = "\n".join(path.read_text("utf-8", "replace") for path in said if path.exists())
    assert codes == [0] * world, f"exit codes {codes}: {told}"


def command(world: int, argv: list[str], output: Path) -> list[command_line.Command]:
    """`kinvec ARGV…` in `world` processes."""
    port, started = free_port(), []
    before = dict(os.environ)
    for rank in range(world):
        os.environ.update(environment(rank, world, port))
        started.append(command_line.start(argv, output.with_name(f"{output.name}-{rank}")))
    os.environ.clear()
    os.environ.update(before)
    return started
