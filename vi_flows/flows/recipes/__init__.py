"""The families, one short function each: ``recipes.NAME(dim, context=None, ...) -> Flow``.

All start near the identity, so that a fit begins at its base; all take a ``base`` (standard normal by default). A file
here names its families in ``__all__``; nothing else lists them.
"""

from . import autoregressive, coupling, parametric
from .autoregressive import *
from .coupling import *
from .parametric import *

__all__ = [*parametric.__all__, *coupling.__all__, *autoregressive.__all__]
