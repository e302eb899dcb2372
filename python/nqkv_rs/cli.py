"""The command ``nqkv-rs``: a table of its subcommands, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__, demo, doctor

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows the command's name; ``sys.argv[1:]`` if not given.

    Returns:
        The exit status: 0, or 1 after an error that was explained on standard error, or 130 after
        Ctrl-C, or 141 if nobody reads the output any more (``| head``). Wrong usage raises
        ``SystemExit(2)``, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="nqkv-rs", description="Quantized KV caches: see one work, and see what runs here."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, summary in (
        ("demo", demo, "generate with a real model, dense and packed, and compare"),
        ("doctor", doctor, "versions, CPU features, GPU or none and why, what will run where"),
    ):
        sub = commands.add_parser(name, help=summary, description=f"{summary}.")
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ImportError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        # These are written for users; a traceback would bury them.
        print(f"nqkv-rs {options.command}: {error}", file=sys.stderr)
        return 1
