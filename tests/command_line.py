"""The real command in a process of its own, forked from a server that has done the imports, so it starts at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOAD = [
    "kinvec.pipeline",
    "kinvec.reporting",
    "kinvec.verbs.train",
    "transformers.models.bert.modeling_bert",
    "peft",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOAD)  # the first to start a process starts the server, which learns nothing later
WAIT = 120.0  # seconds after which a test gives up, on however slow a machine


def _main(argv: list[str], environment: dict[str, str], output: Path) -> None:
    with open(output, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    from kinvec.cli import main

    sys.argv = ["kinvec", *argv]
    main()


@dataclass
class Command:
    """A running `kinvec` command; its standard output and error go to one file."""

    process: ForkServerProcess
    output: Path

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text("utf-8") if self.output.exists() else ""

    def wait(self) -> int:
        """Its exit code; a negative one is the signal that ended it."""
        self.process.join(WAIT)
        assert self.process.exitcode is not None, f"still running after {WAIT} s: {self.said}"
        return self.process.exitcode

    def wait_for(self, path: Path, lines: int) -> bool:
        """Whether the file has grown to so many lines before the command ended."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end and self.process.is_alive():
            if path.exists() and path.read_bytes().count(b"\n") >= lines:
                return True
            time.sleep(0.001)
        return False

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the signal, if it is still running; its exit code."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)
        return self.wait()


def start(argv: list[str], output: Path) -> Command:
    """Run `kinvec ARGV…`, with this process's environment as it is now."""
    process = FORKS.Process(target=_main, args=(argv, dict(os.environ), output))
    process.start()
    return Command(process, output)
