"""Checkpoints that never lie: `fp8fx.save` and `fp8fx.load`, and what torch.distributed.checkpoint needs.

format       the layout of the file and its digests
tree         plain data and tensors as JSON and a table of tensors
parts        what a checkpoint is made of
write, read  the file: atomic, verified
check        does it fit?          migrate   what to do where it does not
apply        put in place, or back
saving, loading, distributed       the public functions
"""

from fp8fx.checkpoint.distributed import DistributedState
from fp8fx.checkpoint.loading import Restored, load
from fp8fx.checkpoint.saving import save

__all__ = ["DistributedState", "Restored", "load", "save"]
