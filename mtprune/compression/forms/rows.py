"""The rows form: a dense layer without its dead outputs."""

from mtprune.compression.forms.thin import Thin

__all__ = ["Rows"]


class Rows(Thin):
    """`Thin` that reads all inputs: only dead outputs are dropped."""

    choice = "rows"
    drops_inputs = False
