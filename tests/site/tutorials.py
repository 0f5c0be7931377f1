"""Tutorials: scripts in cells (``# %%``), and pages made of them with what they printed.

A cell is prose if it begins with ``# %% [markdown]``, and code otherwise. `keep` executes the code
cell by cell and keeps what each printed and drew beside the script; `page` puts it together.
"""

import ast
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent.parent / "docs" / "tutorials"
MARK = re.compile(r"^# %%(.*)\n", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """A part of a script: prose or code."""

    prose: bool
    text: str
    line: int


def scripts() -> list[Path]:
    """The tutorials."""
    return sorted(FOLDER.glob("*.py"))


def cells(script: Path) -> list[Cell]:
    """A script taken apart, with the line at which each cell begins."""
    text = script.read_text()
    marks = list(MARK.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        prose, body = "[markdown]" in mark[1], text[mark.end() : end]
        if prose:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append(Cell(prose, body.strip("\n"), text.count("\n", 0, mark.end())))
    return found


def code(script: Path) -> list[Cell]:
    """The cells that run."""
    return [cell for cell in cells(script) if not cell.prose]


def execute(script: Path) -> Iterator[tuple[str, list[Any]]]:
    """Run a script: for each cell of code what it printed, and the figures that it left open."""
    space: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    figures()  # of somebody else, which are not the script's
    for cell in code(script):
        printed = io.StringIO()
        tree = ast.parse(cell.text, str(script))
        ast.increment_lineno(tree, cell.line)
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, str(script), "exec"), space)
        yield printed.getvalue(), figures()


def figures() -> list[Any]:
    """The open figures of matplotlib, if it is in use, which are closed."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    from matplotlib import pyplot

    found = [pyplot.figure(number) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return found


def keep(script: Path) -> None:
    """Run a script, and keep what it printed and drew, with the code that did."""
    outputs = []
    for number, (printed, drawn) in enumerate(execute(script)):
        names = []
        for figure in drawn:
            names.append(f"{script.stem}-{number}.png")
            figure.savefig(script.parent / names[-1], dpi=120)
        outputs.append({"code": code(script)[number].text, "printed": printed, "pictures": names})
    kept(script).write_text(json.dumps(outputs, indent=1) + "\n")


def is_current(script: Path) -> bool:
    """Whether the outputs that are kept are those of the code as it is, but for its layout."""
    outputs = json.loads(kept(script).read_text())
    now, then = [cell.text for cell in code(script)], [output["code"] for output in outputs]
    same = (
        ast.dump(ast.parse(a)) == ast.dump(ast.parse(b)) for a, b in zip(now, then, strict=False)
    )
    return len(now) == len(then) and all(same)


def kept(script: Path) -> Path:
    """Where the outputs of a script are."""
    return script.with_suffix(".json")


def page(script: Path) -> str:
    """The script as a page, with its outputs."""
    outputs = iter(json.loads(kept(script).read_text()))
    parts = []
    for cell in cells(script):
        if cell.prose:
            parts.append(cell.text)
            continue
        output = next(outputs)
        parts.append(f"```{{code-block}} python\n{cell.text}\n```")
        if output["printed"].strip():
            printed = output["printed"].rstrip()
            parts.append(f"```{{code-block}} text\n:class: printed\n{printed}\n```")
        parts += [f"![What the cell above drew]({name})" for name in output["pictures"]]
    parts.append(f"The script: {{download}}`{script.name}`, as cells for any notebook.")
    return "\n\n".join(parts) + "\n"
