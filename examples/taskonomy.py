"""Train and prune on Tiny-Taskonomy: segmentation, normals, depth, keypoints, edges.

--data has Omnidata's folders, split by AdaShare's lists (``taskonomy.json`` and
``semseg_prior_factor.npy``) or by buildings (``train_val_test_tiny.csv``). Learning rates, crops
and weights are those of AdaShare and DiSparse.

    python taskonomy.py --data DIR --method disparse_dynamic --sparsity 0.9
"""

from common import data, losses
from common.loop import main
from common.options import Problem

PROBLEM = Problem(
    name="taskonomy",
    tasks=("seg", "normal", "depth", "keypoint", "edge"),
    layouts=data.TASKONOMY,
    make_tasks=lambda source: {
        "seg": losses.segmentation(source.outputs["seg"], classes=source.class_weights),
        "normal": losses.normals(weight=3),
        "depth": losses.depth(weight=2),
        "keypoint": losses.keypoints(weight=7),
        "edge": losses.edges(weight=7),
    },
    defaults={
        "lr_trained": 1e-4,
        "lr_tuned": 1e-6,
        "lr_every": 12_000,
        "lr_factor": 0.3,
        "steps": 100_000,
    },
)

if __name__ == "__main__":
    main(PROBLEM)
