"""Forms: everything that a layer can become. A form is one file of this folder, and one line below.

The file defines a subclass of `Form` with a name, the parts that the form stores of a layer, and a
``forward``. Every other property is a class attribute or method of `Form` with a default.
"""

from mtprune.compression.forms.base import EXPORTERS, Dense, Form
from mtprune.compression.forms.csr import Csr
from mtprune.compression.forms.rank import Rank
from mtprune.compression.forms.rows import Rows
from mtprune.compression.forms.semi_structured import SemiStructured
from mtprune.compression.forms.sparse import Sparse
from mtprune.compression.forms.thin import Thin

__all__ = [
    "ALL",
    "CHOICES",
    "EXPORTERS",
    "FORMS",
    "Csr",
    "Dense",
    "Form",
    "Rank",
    "Rows",
    "SemiStructured",
    "Sparse",
    "Thin",
]

ALL: tuple[type[Form], ...] = (Rows, Thin, Sparse, Csr, SemiStructured, Rank)
"""All forms but the dense layer itself, in the order in which a plan lists them."""

FORMS: dict[str, type[Form]] = {form.choice: form for form in ALL}
"""The forms by name."""

CHOICES: tuple[str, ...] = ("dense", *FORMS)
"""The names that a plan may give to the form of a layer; ``"dense"`` is the layer as it is."""
