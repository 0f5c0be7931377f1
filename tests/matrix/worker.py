"""Tries the models that are named, and writes what is known of each after every cell."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mtprune.files import write_text
from tests.matrix.checks import try_all
from tests.matrix.models import ENTRIES


def _note(path: Path, row: dict[str, Any]) -> None:
    write_text(path, json.dumps(row, indent=1))


def main() -> None:
    """``python -m tests.matrix.worker FOLDER COLUMNS NAME...``."""
    folder, columns = Path(sys.argv[1]), sys.argv[2].split("|")
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        print(f"begin {name}", flush=True)
        path = folder / f"{name.replace(': ', ' ').replace(' ', '_')}.json"
        try_all(ENTRIES[name], columns, partial(_note, path))
        print(f"end {name}", flush=True)


if __name__ == "__main__":
    main()
