"""Which operators the host waits for on CUDA."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

# Their results, or the shapes of their results, depend on values: the host waits for them.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "nonzero_numpy"),
}
COUNTED = {"repeat_interleave.Tensor", "repeat_interleave.self_Tensor"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


def waits(func: Any, args: tuple) -> bool:
    """Whether the host would wait for this operator."""
    name = func._opname
    masks = [one for one in tree_leaves(args[1:2]) if isinstance(one, torch.Tensor) and one.dtype == torch.bool]
    return name in WAITING or f"{name}.{func._overloadname}" in COUNTED or bool(name in INDEXING and masks)
