"""Write a small data set in a published layout, to try a trainer with nothing downloaded.

python make_fixture.py nyuv2 nyuv2_fixture
python nyuv2.py --data nyuv2_fixture --method vote --steps 30 --width 0.1 --crop 64 64 --batch 2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import fixture


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the files."""
    parser = argparse.ArgumentParser(
        description="Write a small rendered data set in a published layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("layout", choices=list(fixture.LAYOUTS), help="whose files to write")
    add("folder", type=Path, help="where to; made if need be")
    add("--size", type=int, nargs=2, default=[96, 128], metavar=("H", "W"), help="of the pictures")
    add("--seed", type=int, default=0, help="of the scenes")
    options = parser.parse_args(arguments)
    fixture.write(options.layout, options.folder, tuple(options.size), options.seed)
    print(f"Wrote {options.layout} to {options.folder}.")


if __name__ == "__main__":
    main()
