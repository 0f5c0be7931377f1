"""The page: rows of results as docs/support.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.matrix.checks import COLUMNS, NO, NONE, WRONG, YES
from tests.matrix.models import LIBRARIES

__all__ = ["page"]

_SIGNS = {YES: "yes", NO: "no", NONE: "-", WRONG: "WRONG"}

_HEAD = """# What works with which architecture

Small models with random weights, one of each family, are built and tried from end to end by
`python -m tests.matrix` (in a checkout; the libraries below must be installed). This page is what
it wrote. A model is pruned for two tasks. Its outputs under masks must be those of the finalized
model bitwise, and those of the smaller copy within 1e-5, on other inputs than it was made with.
Where float32 rounds more than that in a model, both are compared in float64, within four times what
it rounds.

| column | is tried |
|---|---|
| elements | half of all single weights, to the weight; the share of all matrices that take part |
| heads, neurons, experts, channels | half of these units, removed: groups x units, what is left |
| ranks | a fifth of the parameters by `LowRank`, in two layers for one |
| compress | 90 % zeros, in sparse forms |
| save, load | the smaller copy, loaded bitwise by `mtprune.load` |
| from_pretrained | the same by `AutoModelFor...from_pretrained` |
| generate | the smaller copy's tokens are those of the pruned model |
| ONNX | the smaller copy exported, and run by onnxruntime |

"yes" passed, "-" has nothing of the kind, "no" was refused, or failed, with the reason below the
table. An empty cell was not tried. Results are kept until `--fresh`, so not all
are of the same state of the code. {wrong}
"""


def page(rows: Iterable[Mapping[str, Any]], versions: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        rows: The rows, as `try_all` notes them.
        versions: The versions of the libraries.
    """
    rows = list(rows)
    built = [row for row in rows if "broken" not in row]
    cells = [cell for row in built for cell in row["cells"].values()]
    wrong = sum(cell["state"] == WRONG for cell in cells)
    told = (
        "No cell went through with a wrong result."
        if not wrong
        else f"{wrong} cells went through with another result than expected: look at them first."
    )
    seen = {column for row in built for column in row["cells"]}
    lines = [x for x in _HEAD.splitlines(True) if not x.startswith("| ONNX") or "ONNX" in seen]
    parts = ["".join(lines).format(wrong=told), _summary(built, versions)]
    for library in LIBRARIES:
        mine = [row for row in built if row["library"] == library]
        if mine:
            parts.append(_table(library, mine))
    broken = [row for row in rows if "broken" in row]
    if broken:
        lines = [f"* {row['name']} ({row['library']}): {row['broken']}" for row in broken]
        parts.append(
            "\n".join(["## Not tried: the model does not run as it was built", "", *lines])
        )
    return "\n".join(parts) + "\n"


def is_green(row: Mapping[str, Any]) -> bool:
    """Whether a model came from pruning to a loaded equal model, with units where it has any."""
    states = {column: cell["state"] for column, cell in row["cells"].items()}
    needed = ("elements", "compress", "save, load")
    fine = all(states.get(column) == YES for column in needed)
    auto = states.get("from_pretrained", NONE) in (YES, NONE)
    units = [states.get(column, NONE) for column in ("heads", "neurons", "experts", "channels")]
    return fine and auto and WRONG not in states.values() and YES in units


def _summary(rows: Sequence[Mapping[str, Any]], versions: Mapping[str, str]) -> str:
    green = sum(map(is_green, rows))
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    counts = []
    for column in COLUMNS:
        states = [row["cells"][column]["state"] for row in rows if column in row["cells"]]
        if states:
            have = sum(state != NONE for state in states)
            counts.append(f"{column} {states.count(YES)} of {have}")
    return (
        f"{green} of {len(rows)} families came from pruning to a loaded equal model, with units "
        f"that were removed. Cells that passed, of those that have something of the kind: "
        f"{', '.join(counts)}. With {listed}.\n"
    )


def _table(library: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [c for c in COLUMNS if any(c in row["cells"] for row in rows)]
    lines = [
        f"## {library}",
        "",
        f"| family | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    reasons: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["name"].lower()):
        shown = []
        for column in columns:
            cell = row["cells"].get(column)
            shown.append("" if cell is None else _cell(cell))
            if cell is not None and cell["state"] in (NO, WRONG):
                reasons.setdefault(cell["why"], []).append(f"{row['name']}, {column}")
        lines.append(f"| {row['name']} | {' | '.join(shown)} |")
    lines.append("")
    for why, cells in reasons.items():
        shown_cells = "; ".join(cells[:8]) + (f"; {len(cells) - 8} more" if len(cells) > 8 else "")
        lines.append(f"* {shown_cells}: {_escaped(why)}")
    return "\n".join(lines) + "\n"


def _cell(cell: Mapping[str, str]) -> str:
    sign = _SIGNS[cell["state"]]
    return f"{sign} ({cell['why']})" if cell["state"] == YES and cell["why"] else sign


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
