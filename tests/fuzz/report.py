"""What fuzzing found, as a table: ``python -m tests.fuzz.report FILE...``."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.fuzz.engine import KINDS, rows


def table(files: Sequence[Path]) -> str:
    """A row of Markdown for each file of outcomes, which is named ``TARGET.jsonl``."""
    head = ["target", "cases", *KINDS, "median s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for path in files:
        found = list(rows(path))
        counts = Counter(row["kind"] for row in found)
        cells = [path.stem, f"{len(found):,}", *(f"{counts[kind]:,}" for kind in KINDS)]
        cells.append(f"{median(row['seconds'] for row in found):.2f}" if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]]))
