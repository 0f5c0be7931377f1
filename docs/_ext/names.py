"""Names of the API become links wherever they are written as code.

In docstrings a name in single backticks is looked up from where it stands: in its class, its
module, then the rest. In pages, code such as ``recipes.best(0.9)`` leads to what it calls. Anything
that is no name of the API stays code.
"""

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode


def name_role(
    role: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any, **__: Any
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """The role of single backticks: a link if there is such a name, code in any case."""
    env = inliner.document.settings.env
    code = nodes.literal(rawtext, text, classes=["py"])
    xref = addnodes.pending_xref(rawtext, code, refdomain="py", reftype="obj", reftarget=text)
    xref["soft"] = True
    xref["refdoc"] = env.docname
    xref["py:module"] = env.ref_context.get("py:module")
    xref["py:class"] = env.ref_context.get("py:class")
    return [xref], []


def find(env: BuildEnvironment, text: str, module: str = "", cls: str = "") -> str | None:
    """The documented name that a piece of code means, if it means one."""
    objects = env.domains.python_domain.objects
    target = text.partition("(")[0].removeprefix("~")
    for path in (f"{module}.{cls}.{target}", f"{module}.{target}", target, f"mtprune.{target}"):
        if path in objects:
            return path
    short = target.removeprefix("mtprune.").rpartition(".")[2]
    if not short[:1].isupper():
        return None
    ends = {name for name, entry in objects.items() if name.endswith(f".{short}")}
    ends = {name for name in ends if not objects[name].aliased}
    return ends.pop() if len(ends) == 1 else None


def link(app: Sphinx, env: BuildEnvironment, node: Any, code: nodes.Element) -> Any:
    """Resolve what Sphinx did not: names in backticks, and types under their private path."""
    path = find(env, node["reftarget"], node.get("py:module") or "", node.get("py:class") or "")
    if path is None:
        return code if node.get("soft") else None
    return reference(app, node["refdoc"], path, code)


def reference(app: Sphinx, page: str, path: str, code: nodes.Element) -> nodes.Element:
    """A link to a documented name."""
    entry = app.env.domains.python_domain.objects[path]
    return make_refnode(app.builder, page, entry.docname, entry.node_id, code, path)


def link_pages(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Code in the pages that names something of the API."""
    if page.startswith("reference/"):
        return
    for code in list(tree.findall(nodes.literal)):
        parent: Any = code.parent
        while parent is not None and not isinstance(parent, nodes.reference | nodes.title):
            parent = parent.parent
        text = code.astext()
        bare = text.partition("(")[0]
        # A lower-case word by itself may be anything; with a module or a call it is ours.
        if parent is None and (bare[:1].isupper() or "." in bare) and " " not in bare:
            path = find(app.env, text)
            if path:
                code.replace_self(reference(app, page, path, code.deepcopy()))


COLON = "\N{TWO DOT PUNCTUATION}"


def hide_colon(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Google style reads ``kind: text`` at the start of an attribute as its type; ours is prose."""
    if what in {"attribute", "data", "property"} and lines:
        lines[0] = lines[0].replace(": ", f"{COLON} ")


def show_colon(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """And back, once Google style has been read."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def readable_defaults(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """Defaults that are made anew, or are functions, as they would be written."""
    if signature:
        signature = re.sub(r"<factory>", "...", signature)
        signature = re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", signature)
    return signature, returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Register role and look-ups."""
    app.add_role("name", name_role)
    app.connect("autodoc-process-docstring", hide_colon, priority=400)
    app.connect("autodoc-process-docstring", show_colon, priority=600)
    app.connect("autodoc-process-signature", readable_defaults)
    app.connect("missing-reference", link)
    app.connect("doctree-resolved", link_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
