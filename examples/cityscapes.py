"""Train and prune on Cityscapes: segmentation, inverse depth.

--data has AdaShare's layout (``cityscape.json``, 19 classes) or MTAN's (``train/image/0.npy``, 7
classes). Learning rates, crops and weights are those of AdaShare and DiSparse.

    python cityscapes.py --data DIR --method disparse_dynamic --sparsity 0.9
"""

from common import data, losses
from common.loop import main
from common.options import Problem

PROBLEM = Problem(
    name="cityscapes",
    tasks=("seg", "depth"),
    layouts=data.CITYSCAPES,
    make_tasks=lambda source: {
        "seg": losses.segmentation(source.outputs["seg"]),
        "depth": losses.depth(weight=20),
    },
    defaults={"lr_trained": 1e-4},
)

if __name__ == "__main__":
    main(PROBLEM)
