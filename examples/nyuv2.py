"""Train and prune on NYU-v2: segmentation, surface normals, depth.

--data has AdaShare's layout (``nyu_v2_3task.json``, 40 classes) or MTAN's (``train/image/0.npy``,
13 classes). Learning rates, crops and the weights of segmentation and normals are those of AdaShare
and DiSparse; the weight of depth is ours.

    python nyuv2.py --data DIR --method disparse_dynamic --sparsity 0.9
"""

from common import data, losses
from common.loop import main
from common.options import Problem

PROBLEM = Problem(
    name="nyuv2",
    tasks=("seg", "normal", "depth"),
    layouts=data.NYUV2,
    make_tasks=lambda source: {
        "seg": losses.segmentation(source.outputs["seg"]),
        "normal": losses.normals(weight=20),
        "depth": losses.depth(weight=2),
    },
    defaults={"lr_trained": 1e-3, "crop": [321, 321]},
)

if __name__ == "__main__":
    main(PROBLEM)
