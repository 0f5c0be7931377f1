"""The long description: README with links that lead somewhere outside of the checkout.

Everything else is in ``setup.cfg``.
"""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

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


if __name__ == "__main__":
    setup(
        long_description=described((ROOT / "README.md").read_text(), *metadata()),
        long_description_content_type="text/markdown",
    )
