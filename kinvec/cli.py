"""argv → verb. A verb's file is imported only when that verb is asked for, so that `--help` is instant."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from kinvec.contracts import KinvecError, presentable

VERBS = {
    "demo": "Build a search problem from installed packages, tune a model on it, show the gain.",
    "init": "Write a commented recipe for your own data.",
    "check": "Examine training data: what is wrong with it, where, and the remedy.",
    "prepare": "Cut raw text into training texts.",
    "mine": "Find hard negatives for your queries, and say how far they can be trusted.",
    "plan": "Say what a training will take on this machine: memory, time, chunks.",
    "train": "Train an embedding model on your data, and prove that it got better.",
    "evaluate": "Measure a model on retrieval or similarity data, query by query.",
    "compare": "Compare results and runs: differences, intervals, p-values, wins and losses.",
    "report": "Turn a run into one HTML page.",
    "search": "Ask a question and see what the base and the tuned model answer.",
    "embed": "Turn queries and documents into a folder of vectors.",
    "convert": "Turn a BERT model folder into NVIDIA NeMo's .nemo, or a .nemo into a folder.",
    "info": "Say what a model folder is.",
}

EPILOGUE = """\
`train` takes settings as key=value (trainer.epochs=3); the other verbs take flags. `kinvec VERB --help` tells all.
--version prints the version; --debug, anywhere, shows the traceback behind an error.
Exit codes: 0 done, 1 the data, the model or the machine is wrong, 2 the arguments or the recipe, 3 a gate is broken."""


INTERRUPTED = 130
IN_STEP = ("train",)  # of several processes all do the whole of it; in other verbs they help the first
RESUMING = ("demo", "train", "mine", "embed")  # verbs whose work is kept as it is done


def overview() -> str:
    """What `kinvec --help` prints."""
    rows = "\n".join(f"  {name:<9} {text}" for name, text in VERBS.items())
    head = "kinvec turns any BERT or LLM into an embedding model for your own data, and proves that it got better."
    return f"{head}\n\nUsage: kinvec VERB …\n\n{rows}\n\n{EPILOGUE}"


def load_verb(name: str) -> Any:
    """The command of a verb, built by typer from `kinvec.verbs.NAME.command`."""
    import typer

    module = importlib.import_module(f"kinvec.verbs.{name}")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=name, help=module.command.__doc__ or VERBS[name])(module.command)
    return typer.main.get_command(app)


def run_verb(argv: list[str]) -> int:
    """Run what the arguments ask for; the exit code."""
    verb = argv[0] if argv else "--help"
    if verb in ("--help", "-h", "help"):
        print(overview())
        return 0
    if verb == "--version":
        from kinvec import __version__

        print(f"kinvec {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the verbs are {', '.join(VERBS)}."
        print(f"error: there is no verb '{verb}'; {hint}", file=sys.stderr)
        return 2
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and verb not in IN_STEP:
        from kinvec import distributed

        distributed.start()
        raise SystemExit(distributed.led(lambda: _exit_code(verb, argv[1:])))
    _call(verb, argv[1:])
    return 0


def _call(verb: str, arguments: list[str]) -> None:
    try:
        load_verb(verb)(args=arguments, prog_name=f"kinvec {verb}", standalone_mode=True)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer's word for Ctrl-C
            raise KeyboardInterrupt from None
        raise


def _exit_code(verb: str, arguments: list[str]) -> Any:
    try:
        _call(verb, arguments)
    except SystemExit as ended:
        return ended.code
    return 0


def main() -> None:
    """The entry point of the `kinvec` command. An error is one sentence; the traceback only with --debug."""
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    with suppress(ValueError):  # not the main thread: whoever owns it handles signals
        signal.signal(signal.SIGTERM, _stop)
    try:
        code = run_verb(argv)
    except (KinvecError, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"error: {presentable(_sentence(error))}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        kept = "continues where it was" if argv[0] in RESUMING else "begins again; nothing half-made is left"
        print(f"stopped; the same command {kept}.", file=sys.stderr)
        code = INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _stop(*_: object) -> None:
    """SIGTERM, as a scheduler sends it, ends a command as Ctrl-C does; training saves first (trainer.py)."""
    raise KeyboardInterrupt


def _sentence(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "the machine ran out of memory; close other programs, or set a smaller trainer.memory_budget."
    if isinstance(error, OSError) and not isinstance(error, KinvecError):
        import errno

        where = f" ({error.filename})" if error.filename else ""
        remedies = {
            **dict.fromkeys(
                (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
                f"the disk is full{where}; free some space and run the same command again: nothing is lost.",
            ),
            errno.EROFS: f"the disk is read-only{where}; name a folder that may be written to, or mount it writable.",
            errno.EACCES: f"permission denied{where}; name another folder, or ask for the right to use this one.",
            errno.ENOENT: f"a file is gone{where}; put it back and run the same command again: what is done is kept.",
            errno.EIO: f"the disk cannot be read or written{where}; copy what is there to another, and go on there.",
        }
        return remedies.get(error.errno or 0) or f"{error.strerror or error}{where}"
    return str(error)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    main()
