"""The command line: ``python -m mtprune``, or ``mtprune``.

Exit codes: 0 if what was asked for was done; 1 if a file cannot be read, is damaged or is of no
known kind, or the page cannot be written; 2 if the command itself is wrong. Errors go to standard
error, in one line.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from mtprune import files
from mtprune.inspecting import Found, compare, inspect
from mtprune.report import check_page
from mtprune.showing.page import plan_page

__all__ = ["main"]

_PATH = (
    "the checkpoint of a pruner, a model's state (both as torch.save wrote them), or the folder of "
    "a compressed model"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code.

    Args:
        arguments: The words after the name of the program; those of this process unless given.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], str] = options.command
    try:
        print(command(options), flush=True)
    except BrokenPipeError:  # whoever reads has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, ImportError) as error:
        print(f"mtprune: {error}", file=sys.stderr)
        return 1
    return 0


def _inspect(options: argparse.Namespace) -> str:
    found = inspect(options.path, options.part)
    return json.dumps(found.to_dict(), indent=1) if options.json else str(found)


def _compare(options: argparse.Namespace) -> str:
    found = compare(inspect(options.first, options.part), inspect(options.second, options.part))
    return json.dumps(found.to_dict(), indent=1) if options.json else str(found)


def _report(options: argparse.Namespace) -> str:
    return f"Wrote {_save(inspect(options.path, options.part), options.output, options.mask)}."


def _save(found: Found, output: str, layers: Sequence[str]) -> Path:
    """Write the page of what a file says.

    Raises:
        ValueError: If a layer that is to be drawn has no mask there.
    """
    unknown = [name for name in layers if name not in found.masks]
    if unknown:
        raise ValueError(
            f"'{found.path}' has no mask of {unknown}. It has those of {sorted(found.masks)[:8]}."
        )
    masks = {name: found.masks[name] for name in layers}
    if found.report is not None:
        return found.report.save(output, masks=masks)
    assert found.plan is not None
    target = check_page(output)
    files.write_text(target, plan_page(found.plan))
    return target


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mtprune",
        description="What files say about pruning: who keeps what, for whom.",
        epilog="Exit codes: 0 done, 1 a file cannot be read or written, 2 the command is wrong.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, does, run in (
        ("inspect", "what is pruned, in tables or as JSON", _inspect),
        ("compare", "what two files keep of the same layers", _compare),
        ("report", "the same as one HTML page", _report),
    ):
        command = commands.add_parser(name, help=does, description=f"{does.capitalize()}.")
        command.set_defaults(command=run)
        if name == "compare":
            command.add_argument("first", metavar="A", help=_PATH)
            command.add_argument("second", metavar="B", help="another one")
        else:
            command.add_argument("path", metavar="PATH", help=_PATH)
        command.add_argument(
            "--part", metavar="KEY", help="which state to look at, where a file holds several"
        )
        if name == "report":
            command.add_argument("-o", "--output", metavar="FILE", required=True, help="the page")
            command.add_argument(
                "--mask", metavar="LAYER", action="append", default=[], help="draw its mask too"
            )
        else:
            command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _version() -> str:
    try:
        return metadata.version("mtprune")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "mtprune, not installed"


if __name__ == "__main__":
    sys.exit(main())
