"""Metrics: how a model does on every task, and how a pruned one does against the dense one.

The metrics stream: `update` adds a batch to a few sums on the device the predictions are on, and
never waits for that device; `compute` divides. Nothing is kept per image, so the result does not
depend on how the data is cut into batches, and parts seen by several processes add up.

A metric is never NaN. What cannot be measured is a ValueError that names the metric: wrong shapes,
classes out of range, numbers that are not finite, or no valid pixel at all. Where looking at the
values would mean waiting for an accelerator, the complaint comes from `compute` instead of
`update`.

Scores of classes are fractions; shares of pixels within a threshold are percentages; angles are in
degrees.

``compat="disparse"`` and ``compat="adapmtl"`` measure what the code released with these papers
measured, so that numbers can be held against their tables, and against nothing else:

=================  =========  =======  ===========================================================
metric             disparse   adapmtl  what it does
=================  =========  =======  ===========================================================
miou               yes        yes      leaves out classes without a single hit, however many pixels
                                       they have
pixel_accuracy     yes                 is the mean of the images' accuracies, and counts pixels with
                                       a negative label as errors
delta1..3          yes        yes      take a negative depth for an inlier, and a ratio of
                                       exactly 1.25**i too
absolute,          yes                 (of depth) are means of the images' means
relative
absolute,                     yes      (of depth) are means of the batches' means, weighted by the
relative                               number of images
mean, median,      yes                 (of normals) are taken on targets in [0, 255], never decoded
within_*
error                         yes      (of normals) is the mean cosine, which was added to errors to
                                       select a checkpoint: worse normals win
=================  =========  =======  ===========================================================
"""

from collections.abc import Mapping
from typing import Any

from mtprune.metrics.absolute import Edges, Keypoints
from mtprune.metrics.base import Compat, Metric
from mtprune.metrics.binary import Binary
from mtprune.metrics.classes import Accuracy, Segmentation
from mtprune.metrics.delta import DeltaT, delta_t
from mtprune.metrics.depth import Depth
from mtprune.metrics.normals import Normals, decode_normals

__all__ = [
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "Accuracy",
    "Binary",
    "Compat",
    "DeltaT",
    "Depth",
    "Edges",
    "Keypoints",
    "Metric",
    "Normals",
    "Segmentation",
    "decode_normals",
    "delta_t",
    "lower_is_better",
]

LOWER_IS_BETTER = frozenset({"absolute", "error", "loss", "mean", "median", "relative", "rmse"})
"""What is an error rather than a score, among the names that the metrics here give, and losses."""

HIGHER_IS_BETTER = frozenset(
    {
        *("accuracy", "balanced_accuracy", "f1", "miou", "pixel_accuracy", "roc_auc"),
        *("delta1", "delta2", "delta3", "within_11.25", "within_22.5", "within_30"),
    }
)
"""What is a score."""


def lower_is_better(results: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """Which metrics are errors, as `delta_t` wants to be told.

    Args:
        results: ``{task: {metric: value}}``, with the names that the metrics here give.

    Example:
        >>> dense = {"seg": {"miou": 0.5}, "depth": {"absolute": 0.4, "delta1": 50.0}}
        >>> pruned = {"seg": {"miou": 0.4}, "depth": {"absolute": 0.5, "delta1": 45.0}}
        >>> lower_is_better(dense)
        {'seg': set(), 'depth': {'absolute'}}
        >>> round(delta_t(pruned, dense, lower_is_better(dense)).overall, 2)
        -18.75
    """
    return {task: set(metrics) & LOWER_IS_BETTER for task, metrics in results.items()}
