r"""Affinity: the overlap of the masks that tasks would have on their own, beside nulls.

The intersection over union of two masks is high wherever both are dense, even if the tasks have
nothing in common: independent masks of densities p and q have :math:`pq / (p + q - pq)`. Network
architecture and layer density alone give a curve that falls with depth. So every overlap here comes
with a null, and what counts is the *excess* over it.

Independent masks are a weak null: tasks that have nothing to do with each other still share the
weights and the pictures that their scores are made of. `permuted` makes the one that counts: the
same tasks, net, batches and sparsity, with every output beside another sample's target. `compare`
gives the excess over it with its interval, `watershed` where it drops, and `suggest_split` where a
trunk may branch. `contrast` puts an overlap beside nulls of your own.
"""

from mtprune.affinity.contrasts import Contrast, Contrasts, contrast
from mtprune.affinity.depth import Watershed, watershed
from mtprune.affinity.null import Null, permuted
from mtprune.affinity.overlap import Affinity, LayerAffinity, chance, compare, iou
from mtprune.affinity.splitting import Split, Splits, suggest_split

__all__ = [
    "Affinity",
    "Contrast",
    "Contrasts",
    "LayerAffinity",
    "Null",
    "Split",
    "Splits",
    "Watershed",
    "chance",
    "compare",
    "contrast",
    "iou",
    "permuted",
    "suggest_split",
    "watershed",
]
