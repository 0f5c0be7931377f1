"""Testing: what must be true of every vote, saliency and method, yours as well as ours.

Each check raises `AssertionError` with what is wrong. Votes and saliencies are tried on numbers,
methods on a shelf of small awkward nets, `NETS`, which are trained until the last update of the
method's schedule and a little longer. So give a method a short schedule::

    from mtprune.testing import check_method

    def test_my_method():
        check_method(MyMethod(0.7, schedule=Cubic(begin=1, end=7, every=2)))
"""

from mtprune.testing.functions import check_saliency, check_vote
from mtprune.testing.methods import (
    check_backends_agree,
    check_exact_count,
    check_finalize,
    check_method,
    check_nesting,
    check_observe_leaves_no_trace,
    check_resume,
)
from mtprune.testing.nets import NETS, Net

__all__ = [
    "NETS",
    "Net",
    "check_backends_agree",
    "check_exact_count",
    "check_finalize",
    "check_method",
    "check_nesting",
    "check_observe_leaves_no_trace",
    "check_resume",
    "check_saliency",
    "check_vote",
]
