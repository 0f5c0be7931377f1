"""Where tasks agree: the overlap of their masks against what chance gives, and the watershed."""

from collections.abc import Mapping
from math import isnan

from mtprune.affinity import Affinity, LayerAffinity, watershed
from mtprune.showing import svg
from mtprune.showing.html import Element, element, table

__all__ = ["agreement"]

_LEAST = 0.1  # the smallest drop that is called a watershed
_MANY = 8  # of more affinities than that, layers are not drawn


def agreement(found: Mapping[str, Affinity], most: int) -> Element:
    """The section of a page.

    Args:
        found: The affinities, by what they are of.
        most: How many layers are drawn; the table has all.
    """
    if not found:
        return Element("")
    shown = list(dict.fromkeys(layer.name for a in found.values() for layer in a.layers))
    told = (
        "How much the masks that tasks would have alone overlap: intersection over union. Masks "
        "that have nothing to do with each other overlap, too: the excess is what is beyond that."
    )
    parts = [element("h2", "Where tasks agree"), element("p", told)]
    if len(found) > _MANY:
        parts.append(_together(found))
    else:
        parts.append(_heat(found, shown[:most]))
        for what, affinity in found.items():
            parts += _depth(what, affinity)
    parts.append(_table(found, shown))
    return element("section", *parts)


def _heat(found: Mapping[str, Affinity], names: list[str]) -> Element:
    places = {what: {layer.name: layer for layer in a.layers} for what, a in found.items()}
    cells = {}
    for name in names:
        cells[name] = [
            None if layer is None or isnan(value) else value
            for layer in (places[what].get(name) for what in found)
            for value in ((layer.iou, layer.expected) if layer is not None else (0.0, 0.0))
        ]
    head = [column for what in found for column in (what, "unrelated")]
    says = "For each layer the overlap of the tasks' masks, and that of unrelated ones."
    return svg.heat(cells, head, says=says)


def _together(found: Mapping[str, Affinity]) -> Element:
    """A row for each affinity, of all layers together."""
    cells = {
        what: [None, None] if isnan(a.iou) else [a.iou, a.expected] for what, a in found.items()
    }
    says = "The overlap of the tasks' masks in all layers together, and that of unrelated ones."
    return svg.heat(cells, ["overlap", "unrelated"], says=says)


def _depth(what: str, affinity: Affinity) -> list[Element]:
    """The overlap from layer to layer, the band of unrelated tasks, and where tasks part."""
    known = [(i, x) for i, x in enumerate(affinity.layers, start=1) if not isnan(x.iou)]
    if len(known) < 2:
        return []
    curve = [layer.iou for layer in affinity.layers]
    expected = [layer.expected for layer in affinity.layers]
    tested = all(layer.null for layer in affinity.layers)
    split = watershed(affinity if tested else curve, None if tested else expected, least=_LEAST)
    after = None
    if split is not None:
        after = next(i for i, _ in known if i > split.before + 1)
        sentence = (
            f"Watershed of {what}: from {affinity.layers[split.before].name} to "
            f"{affinity.layers[after - 1].name} the excess drops by {split.drop:.2f}, the most "
            "between two layers."
        )
    else:
        beyond = " beyond chance" if tested else ""
        sentence = f"Watershed of {what}: none. The excess never drops by {_LEAST:g}{beyond}."
    picture = svg.lines(
        {
            "overlap": [(float(i), layer.iou) for i, layer in known],
            "unrelated": [(float(i), layer.expected) for i, layer in known],
        },
        unit="share",
        across="layer",
        says=f"Overlap of {what} from layer to layer, and that of unrelated tasks. {sentence}",
        mark=None if split is None or after is None else (split.before + 1.0, float(after)),
        band=[
            (float(i), layer.expected - reach, layer.expected + reach)
            for i, layer in known
            if (reach := layer.reach) is not None
        ],
    )
    return [element("h3", what), picture, element("p", sentence)]


def _table(found: Mapping[str, Affinity], names: list[str]) -> Element:
    places = {what: {layer.name: layer for layer in a.layers} for what, a in found.items()}
    sure = any(layer.reach is not None for a in found.values() for layer in a.layers)
    columns = ["overlap", "unrelated", "excess", *(["±"] if sure else [])]
    rows = []
    for name in names:
        row = [name]
        for what in found:
            layer = places[what].get(name)
            row += [""] * len(columns) if layer is None else _cells(layer, sure)
        rows.append(row)
    total = ["all"]
    for a in found.values():
        total += _cells(a, sure)
    head = ["layer", *(f"{what}: {column}" for what in found for column in columns)]
    caption = "Overlap of masks, that of unrelated tasks, and the excess."
    return table(head, [*rows, total], caption=caption)


def _cells(layer: LayerAffinity | Affinity, sure: bool) -> list[str]:
    if isnan(layer.iou):
        return ["empty", "", "", *([""] if sure else [])]
    expected, reach = layer.expected, layer.reach
    cells = [f"{layer.iou:.3f}", f"{expected:.3f}", f"{layer.iou - expected:+.3f}"]
    return cells + ([f"{reach:.3f}" if reach is not None else ""] if sure else [])
