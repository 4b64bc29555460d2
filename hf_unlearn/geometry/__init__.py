"""Moving and combining gradients and weights as vectors, on every engine: SAM's ascent, projections."""

from .ascent import Ascent, ascended, check_felt
from .fsdp2 import Fsdp2Space, fsdp2_units
from .local import LocalSpace
from .projection import PROJECTIONS, Projection, combine
from .space import ParameterSpace, Vector
from .zero import ZeroSpace

__all__ = [
    "PROJECTIONS",
    "Ascent",
    "Fsdp2Space",
    "LocalSpace",
    "ParameterSpace",
    "Projection",
    "Vector",
    "ZeroSpace",
    "ascended",
    "check_felt",
    "combine",
    "fsdp2_units",
]
