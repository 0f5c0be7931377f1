"""What a compressed model costs, and how it came about: sizes and plan as tables."""

from mtprune.compression.measure import Sizes
from mtprune.compression.plan import Plan
from mtprune.showing.html import Element, element, table

__all__ = ["plan_section", "sizes_section"]

_FORMS = {
    "dense": "stored and computed as it was",
    "rows": "without the outputs whose weights are all zero",
    "thin": "without the inputs and outputs whose weights are all zero",
    "sparse": "only the weights that are not zero, by kernels of mtprune",
    "csr": "only the weights that are not zero, by kernels of torch",
    "2:4": "two of every four weights, by kernels of the GPU",
    "rank": "as the product of two smaller matrices",
}


def sizes_section(sizes: Sizes | None) -> Element:
    """Parameters, multiply-adds, bytes and latency, as stored and without zeros."""
    if sizes is None:
        return Element("")
    head, *rows = sizes.rows
    told = "Numbers of the whole model. 'Not zero', 'not with zeros' and 'without zeros' are what "
    told += "would be left if zeros cost nothing; the others are what there is."
    caption = "Sizes" + (f", timed on {sizes.timed}." if sizes.timed else ".")
    named = [[row[0].strip(), *row[1:]] for row in rows]
    return element(
        "section",
        element("h2", "What it costs"),
        element("p", told),
        table(["of the whole model", *head[1:]], named, caption=caption),
    )


def plan_section(plan: Plan | str | None) -> Element:
    """What `mtprune.compress` made of each layer."""
    if not plan:
        return Element("")
    if not isinstance(plan, Plan):
        inner = element("pre", plan, tabindex="0", role="region", aria_label="Plan")
        return element("section", element("h2", "Compressed"), inner)
    rows = [
        [
            row.layer,
            "x".join(map(str, row.shape)),
            row.choice,
            _ms(row.dense.ms if row.measured else None),
            _ms(None if row.chosen is None else row.chosen.ms),
            f"{row.dense.bytes:,}" if row.measured else "",
            "" if row.chosen is None else f"{row.chosen.bytes:,}",
            row.note,
        ]
        for row in plan.rows
    ]
    head = ["layer", "shape", "form", "ms dense", "ms", "bytes dense", "bytes", "why"]
    told = [f"'{form}': {means}." for form, means in _FORMS.items() if form in _used(plan)]
    if plan.dense_ms is not None and plan.ms is not None:
        told.append(
            f"The whole model took {plan.dense_ms:.2f} ms dense and {plan.ms:.2f} ms compressed "
            f"({plan.device}, threads: {plan.threads})."
        )
    told += [*plan.stayed, *([str(plan.subnetwork)] if plan.subnetwork else [])]
    told += [plan.note] if plan.note else []
    cuts = [
        [cut.tensor, "x".join(map(str, cut.shape)), "x".join(map(str, cut.after))]
        for cut in plan.removal.cuts
    ]
    removed = table(["tensor", "before", "after"], cuts, caption="Units that were removed.")
    return element(
        "section",
        element("h2", "Compressed"),
        *(element("p", sentence) for sentence in told),
        table(head, rows, caption="The form of every layer."),
        *([removed] if cuts else []),
    )


def _used(plan: Plan) -> set[str]:
    return {row.choice for row in plan.rows}


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
