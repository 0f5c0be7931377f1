"""The long description: README with links that lead somewhere outside of the checkout.

With the variable ``MTPRUNE_PREBUILT=1`` wheels bring native code, built for several levels of this
kind of processor. Everything else is in ``setup.cfg``.
"""

import importlib.util
import os
import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # older setuptools
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
CODE = re.compile(r"(^```.*?^```|`(?:[^`\n]|\n(?!\n))+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:|#)([^)\s]+)\)")


def described(text: str, source: str | None, tag: str) -> str:
    """Markdown whose links into the repository are absolute, or plain text if it has no address.

    Args:
        text: The Markdown.
        source: The address of the repository.
        tag: What the links show.
    """

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if source is None:
            return "" if picture else words
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({source.rstrip('/')}/{kind}/{tag}/{target})"

    parts = CODE.split(text)
    # Code stands at odd places, but a link's words may hold code: those parts are joined again.
    marks = [f"\0{place}\0" for place in range(len(parts))]
    joined = "".join(part if i % 2 == 0 else marks[i] for i, part in enumerate(parts))
    return re.sub("\0(\\d+)\0", lambda mark: parts[int(mark[1])], LINK.sub(link, joined))


def metadata() -> tuple[str | None, str]:
    """The address of the repository, if there is one, and the tag of the version."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    section = config["metadata"]
    urls = [line.split("=", 1) for line in section.get("project_urls", "").splitlines() if line]
    named = {name.strip(): url.strip() for name, url in urls}
    return named.get("Source"), f"v{section['version']}"


FORMS = Path("mtprune", "compression", "forms")


class WithNativeCode(build_py):
    """Python files, and the native code of them built."""

    def run(self) -> None:
        """Build the libraries beside the sources of what is built."""
        super().run()
        spec = importlib.util.spec_from_file_location("prebuilt", ROOT / FORMS / "prebuilt.py")
        assert spec is not None
        assert spec.loader is not None
        prebuilt: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(prebuilt)
        to = Path(self.build_lib) / FORMS / prebuilt.FOLDER
        compiler = shlex.split(os.environ.get("CC", "cc"))
        prebuilt.build(sorted((ROOT / FORMS).glob("*.c")), to, compiler)


class ForOneMachine(bdist_wheel):
    """A wheel for one kind of machine, and any Python."""

    def finalize_options(self) -> None:
        """Say that it is not for all machines."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """The tag of the wheel: nothing in it depends on the version of Python."""
        return "py3", "none", super().get_tag()[2]


NATIVE = {"build_py": WithNativeCode, "bdist_wheel": ForOneMachine}

if __name__ == "__main__":
    setup(
        cmdclass=NATIVE if os.environ.get("MTPRUNE_PREBUILT") == "1" else {},
        long_description=described((ROOT / "README.md").read_text(), *metadata()),
        long_description_content_type="text/markdown",
    )
