"""HTML: elements as strings, everything that is not an element escaped."""

from collections.abc import Sequence
from html import escape

__all__ = ["Element", "element", "table", "void"]


class Element(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: object) -> Element:
    """An element with its children; an underscore in an attribute's name stands for a hyphen.

    Args:
        name: The element's name.
        *children: Elements, or text, which is escaped.
        **attributes: Values that are None are left out. ``class_`` is ``class``.

    Example:
        >>> element("p", "a < b", element("b", "!"), class_="note")
        '<p class="note">a &lt; b<b>!</b></p>'
    """
    inner = "".join(child if isinstance(child, Element) else escape(child) for child in children)
    return Element(f"<{name}{_attributes(attributes)}>{inner}</{name}>")


def void(name: str, /, **attributes: object) -> Element:
    """An element that has no children and no end.

    Example:
        >>> void("meta", charset="utf-8")
        '<meta charset="utf-8">'
    """
    return Element(f"<{name}{_attributes(attributes)}>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> Element:
    """A table whose first column names its rows; the others are flush right.

    Args:
        head: The names of the columns.
        rows: The cells.
        caption: What it tells.
    """
    names = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    inner = [element("caption", caption), element("thead", names), element("tbody", *body)]
    # A box of its own, so that a wide table scrolls and the page does not.
    # It can be scrolled by keys, so it can be reached by them, and has a name.
    told = {"tabindex": "0", "role": "region", "aria_label": caption}
    return element("div", element("table", *inner), class_="box", **told)


def _attributes(attributes: dict[str, object]) -> str:
    told = []
    for name, value in attributes.items():
        if value is not None:
            key = name.rstrip("_").replace("_", "-")
            told.append(f' {key}="{escape(str(value))}"')
    return "".join(told)
