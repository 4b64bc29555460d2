"""FSDP2 through accelerate on CPUs, where accelerate (1.15) does not offer it.

The one thing replaced is what accelerate takes the processes for: several CPUs become several devices, which is what
it asks before it looks for FSDP. All that follows is its own code and PyTorch's: it wraps the layers, the head with
the last norm and the embedding, and the model, on every rank from the weights of rank 0; it clips, saves and loads.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

# As --accelerate_config fsdp2 sets them.
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


_initialise = PartialState.__init__


def _several_devices(self: PartialState, *args: Any, **kwargs: Any) -> None:
    _initialise(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU  # the state is shared by all instances


def enable() -> None:
    """For the trainers made from now on."""
    os.environ.update(ENVIRONMENT)
    PartialState.__init__ = _several_devices


def disable() -> None:
    """Undoes [`enable`]."""
    for name in ENVIRONMENT:
        os.environ.pop(name, None)
    PartialState.__init__ = _initialise
