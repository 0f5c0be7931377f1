"""``python -m tests.site --out DIR`` builds the site; ``--tutorials`` runs them anew first."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.site import tutorials
from tests.site.stage import stage


def build(out: Path) -> int:
    """Build strictly, from a copy of the sources: any warning is an error."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        stage(source)
        cache = str(Path(folder) / "doctrees")
        return build_main(
            ["-W", "--keep-going", "-q", "-b", "html", "-d", cache, str(source), str(out)]
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the documentation as a site.")
    parser.add_argument("--out", type=Path, default=Path("build/site"), help="where it goes")
    parser.add_argument(
        "--tutorials",
        nargs="*",
        metavar="NAME",
        help="run these tutorials (all, if none is named), and keep what they print and draw",
    )
    options = parser.parse_args()
    if options.tutorials is not None:
        for script in tutorials.scripts():
            if not options.tutorials or script.stem in options.tutorials:
                print(f"Running {script.name}", flush=True)
                code = "import sys; from tests.site.tutorials import *; keep(Path(sys.argv[1]))"
                subprocess.run([sys.executable, "-c", code, str(script)], check=True)
    code = build(options.out)
    if code == 0:
        print(f"Built {options.out / 'index.html'}.")
    return code


if __name__ == "__main__":
    sys.exit(main())
