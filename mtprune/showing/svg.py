"""Pictures as SVG inside a page: bars of parts, lines over steps, a heat map, and masks.

Colours are classes of the page's style, so that they suit light and dark. Each picture has a text
that says what it shows, for those who do not see it; its numbers stand in a table beside it.
"""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mtprune.showing.html import Element, element, void

__all__ = ["bars", "heat", "lines", "mask"]

_ROW = 22  # pixels from one bar to the next
_LABEL = 210
_WIDTH = 760
_LONGEST = 30  # letters of a label


def bars(
    rows: Mapping[str, Sequence[float]],
    parts: Mapping[str, str],
    told: Sequence[str],
    *,
    says: str,
) -> Element:
    """Stacked bars, one for each row, with a legend.

    Args:
        rows: For each row the share of each part, in [0, 1].
        parts: What the parts are called, and the class of the page's style of each.
        told: For each row what stands behind its bar.
        says: What the picture shows.
    """
    left, right, names = _LABEL, _WIDTH - 110, list(parts)
    marks = [*_legend(parts, left)]
    for i, ((name, shares), text) in enumerate(zip(rows.items(), told, strict=True)):
        y = 30 + i * _ROW
        marks.append(_text(_short(name), left - 8, y + 12, anchor="end", title=name))
        x = float(left)
        for part, share in enumerate(shares):
            width = share * (right - left)
            title = f"{name}, {names[part]}: {share:.1%}"
            if width > 0:
                marks.append(_rectangle(x, y, width, _ROW - 6, parts[names[part]], title))
            x += width
        marks.append(_text(text, right + 8, y + 12))
    return _picture(marks, _WIDTH, 34 + len(rows) * _ROW, says)


def heat(
    rows: Mapping[str, Sequence[float | None]], columns: Sequence[str], *, says: str
) -> Element:
    """A cell for each row and column, the darker the larger its share.

    Args:
        rows: For each row a share in [0, 1] for each column; None where there is none.
        columns: What the columns are called.
        says: What the picture shows.
    """
    left = _LABEL
    wide = min(90.0, (_WIDTH - left - 10) / max(1, len(columns)))
    marks = [
        _text(_short(name, int(wide / 7)), left + (i + 0.5) * wide, 18, anchor="middle", title=name)
        for i, name in enumerate(columns)
    ]
    for i, (name, shares) in enumerate(rows.items()):
        y = 26 + i * _ROW
        marks.append(_text(_short(name), left - 8, y + 14, anchor="end", title=name))
        for j, share in enumerate(shares):
            title = f"{name}, {columns[j]}: " + ("none" if share is None else f"{share:.1%}")
            tone = f"--share:{0 if share is None else share:.3f}"
            box = (left + j * wide, y, wide - 2, _ROW - 2)
            marks.append(_rectangle(*box, "cell", title, style=tone))
            if share is not None and wide >= 34:
                middle = left + (j + 0.5) * wide - 1
                marks.append(_text(f"{share:.0%}", middle, y + 14, anchor="middle"))
    return _picture(marks, _WIDTH, 30 + len(rows) * _ROW, says)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    unit: str,
    across: str,
    says: str,
    mark: tuple[float, float] | None = None,
    band: Sequence[tuple[float, float, float]] = (),
) -> Element:
    """Lines over steps, each named at its end.

    Args:
        series: For each line its points.
        unit: How values are written: ``"share"`` or ``"number"``.
        across: What lies across.
        says: What the picture shows.
        mark: From where to where a stretch is marked.
        band: What is filled: where along, and from which value to which.
    """
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    top = 1.0 if unit == "share" else _round_up(max(ys, default=1.0))
    first, last = min(xs, default=0.0), max(xs, default=1.0)
    left, right, high, low = 56, _WIDTH - 150, 12, 228

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - first) / (last - first) if last > first else 0.5
        return left + along * (right - left), low - (y / top if top else 0.0) * (low - high)

    marks = []
    if mark is not None:
        start, end = (place(x, 0)[0] for x in mark)
        marks.append(_rectangle(start, high, end - start, low - high, "mark", "watershed"))
    if len(band) > 1:
        below = [place(x, max(0.0, value)) for x, value, _ in band]
        above = [place(x, min(top, value)) for x, _, value in band]
        told = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*above, *reversed(below)])
        marks.append(element("polygon", points=told, class_="band"))
    for i in range(5):
        value = top * i / 4
        _, y = place(first, value)
        marks.append(_line([(left, y), (right, y)], "grid"))
        written = f"{value:.0%}" if unit == "share" else f"{value:.3g}"
        marks.append(_text(written, left - 6, y + 4, anchor="end"))
    for x in dict.fromkeys((first, last)):
        marks.append(_text(f"{x:,.0f}", place(x, 0)[0], low + 16, anchor="middle"))
    marks.append(_text(across, (left + right) / 2, low + 16, anchor="middle"))
    ends = _apart({name: place(*line[-1])[1] for name, line in series.items() if line})
    for i, (name, line) in enumerate(series.items()):
        if line:
            marks.append(_line([place(*point) for point in line], f"line s{i % 6}", name))
            marks.append(_text(_short(name, 20), right + 8, ends[name] + 4, kind=f"s{i % 6}"))
    return _picture(marks, _WIDTH, 250, says)


def mask(kept: Tensor, *, says: str, most: int = 96) -> Element:
    """A mask of a layer as a picture: rows are outputs, the darker the more is kept.

    Args:
        kept: The mask, any shape; all but the first dimension lie across.
        says: What the picture shows.
        most: The most pixels along a side; a larger mask is averaged.
    """
    flat = kept.detach().float().cpu().flatten(1) if kept.dim() > 1 else kept.float().cpu()[None]
    high, wide = (min(most, size) for size in flat.shape)
    shares = adaptive_avg_pool2d(flat[None, None], (max(1, high), max(1, wide)))[0, 0]
    levels = (255 - 255 * shares.clamp(0, 1)).round().to(dtype=shares.new_zeros(0).int().dtype)
    data = base64.b64encode(_png(levels.tolist())).decode()
    return void("img", src=f"data:image/png;base64,{data}", alt=says, class_="mask", width=wide * 3)


def _png(rows: Sequence[Sequence[int]]) -> bytes:
    """A grey picture of 8 bits a pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    body = b"".join(b"\0" + bytes(row) for row in rows)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(body, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def _apart(ends: Mapping[str, float], least: float = 15.0) -> dict[str, float]:
    """Where labels stand, near where lines end, and not on each other."""
    placed: dict[str, float] = {}
    above = -math.inf
    for name, y in sorted(ends.items(), key=lambda item: item[1]):
        above = placed[name] = max(y, above + least)
    excess = max(placed.values(), default=0.0) - 240.0
    return {name: y - max(0.0, excess) for name, y in placed.items()}


def _round_up(value: float) -> float:
    """The next round number."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 2.5, 5, 10) if step * unit >= value * (1 - 1e-9))


def _legend(parts: Mapping[str, str], left: float) -> list[Element]:
    marks, x = [], float(left)
    for name, kind in parts.items():
        marks.append(_rectangle(x, 6, 12, 12, kind, name))
        marks.append(_text(name, x + 17, 16))
        x += 32 + 7 * len(name)
    return marks


def _picture(marks: Sequence[Element], width: float, height: float, says: str) -> Element:
    box = f"0 0 {width:g} {height:g}"
    inner = [element("title", says), *marks]
    picture = element("svg", *inner, viewBox=box, role="img", aria_label=says)
    # On a phone it is wider than the page: it scrolls, by keys too.
    told = {"tabindex": "0", "role": "region", "aria_label": "picture"}
    return element("div", picture, class_="picture", **told)


def _rectangle(
    x: float,
    y: float,
    width: float,
    height: float,
    kind: str,
    title: str,
    style: str | None = None,
) -> Element:
    places = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    return element("rect", element("title", title), class_=kind, style=style, **places)


def _line(points: Sequence[tuple[float, float]], kind: str, title: str = "") -> Element:
    told = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    inner = [element("title", title)] if title else []
    return element("polyline", *inner, points=told, class_=kind)


def _text(
    text: str,
    x: float,
    y: float,
    *,
    anchor: str | None = None,
    kind: str | None = None,
    title: str = "",
) -> Element:
    inner: list[str] = [element("title", title)] if title and title != text else []
    return element(
        "text", *inner, text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=kind
    )


def _short(name: str, most: int = _LONGEST) -> str:
    """A long name with its middle left out."""
    most = max(4, most)
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"
