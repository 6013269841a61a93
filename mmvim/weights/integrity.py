"""A digest of what a checkpoint holds, which stays the same however and wherever its file is written again."""

import hashlib
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

# entry of a checkpoint's meta: digests by entry
DIGEST = 'digest'


def digest(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every entry but `meta`, by name: of names, dtypes, shapes and bytes; 1.4 GB a second.

    One for each, so that a file that is published without its optimiser still has those of its weights.
    """
    return {str(name): _digest_of(value) for name, value in checkpoint.items() if name != 'meta'}


def damaged_entries(checkpoint: Any) -> list[str] | None:
    """Names of the entries that are not what was saved; None if nothing was noted when the file was saved."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    noted = meta.get(DIGEST) if isinstance(meta, Mapping) else None
    if not isinstance(noted, Mapping):
        return None
    return [name for name, found in digest(checkpoint).items() if noted.get(name, found) != found]


def _digest_of(value: Any) -> str:
    state = hashlib.sha256()
    todo, seen = [value], {}
    while todo:  # no recursion: files nest as deep as they like, or hold themselves
        x = todo.pop()
        if isinstance(x, Mapping | list) and x:
            if id(x) in seen:
                continue
            seen[id(x)] = x  # which keeps it, so that no other gets its number
        if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_meta:
            state.update(f'tensor {x.dtype} {tuple(x.shape)} '.encode())
            state.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(x, np.ndarray) and not x.dtype.hasobject:
            state.update(f'array {x.dtype.str} {x.shape} '.encode())
            state.update(x.tobytes())
        elif isinstance(x, Mapping):
            state.update(f'dict {len(x)} '.encode())
            todo += [part for item in x.items() for part in item]
        elif isinstance(x, list | tuple | np.ndarray):
            state.update(f'list {len(x)} '.encode())
            todo += list(x)
        elif isinstance(x, np.generic):
            todo.append(x.item())
        elif x is None or isinstance(x, bool | int | float | complex | str | bytes):
            state.update(f'{x!r} '.encode())
        else:  # a set has no order; of a function the name counts, of other objects what is pickled
            state.update(f'{getattr(x, "__qualname__", type(x).__qualname__)} '.encode())
            if isinstance(x, Set):
                todo += sorted(map(repr, x))
            elif not callable(x):
                todo.append(x.__getstate__() if hasattr(x, '__getstate__') else getattr(x, '__dict__', None))
    return state.hexdigest()
