"""Shared batch normalization as PyTorch modules: autograd, state_dict, and models converted there and back.

    model = sharednorm.torch.convert(model, hub, prefix="resnet/")

Scale and bias are parameters of the module, as in PyTorch: its optimizer trains them. What the layer on the server has
is the running statistics, which all processes share.
"""

from __future__ import annotations

from sharednorm.torch.conversion import convert, revert
from sharednorm.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert", "revert"]

# The classes and functions belong to this package, whichever of its modules defines them.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
