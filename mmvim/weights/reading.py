"""Read checkpoint files without running code from them, and find the weights inside.

`mmvim.compat` makes mmengine read local files and URLs through `read_from_local` and `read_from_http` too, so that
`init_cfg`, `load_from`, `resume` and the test tools have the same safety and the same messages.
"""

import argparse
import hashlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmvim.errors import CheckpointError

# where checkpoints keep their weights, outermost first; weights may be nested
WEIGHT_KEYS = ('state_dict', 'model', 'model_ema', 'state_dict_ema', 'module')
# prefixes that wrappers put before every name
WRAPPER_PREFIXES = ('module.', '_orig_mod.')
# what averages of a model, of mmengine and of torch, count beside the model's names
COUNTERS = ('steps', 'n_averaged')

# how much larger than a file its contents may be: torch.save does not compress, and weights hardly shrink
MAX_RATIO = 100

# entries of a module's metadata in a state dict: the file it came from, for messages, and the name by which the code
# that trained it built the model, `args.model` of the file
SOURCE = 'source'
MODEL_NAME = 'model_name'

# the one schedule of mmengine whose state holds functions, by their name; imported only where a file has them
ONE_CYCLE = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'

MapLocation = str | torch.device | Callable | Mapping | None


def _method(owner: Any, name: str) -> Any:
    """What a pickled `getattr` means here: mmengine's logs and its one-cycle schedule name their own methods by it."""
    if owner is HistoryBuffer and not name.startswith('_'):
        return getattr(owner, name)
    if owner == ONE_CYCLE and name in ('_annealing_cos', '_annealing_linear'):
        from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

        return getattr(OneCycleParamScheduler, name)
    raise pickle.UnpicklingError(f'getattr of {owner!r}')


def _allowed() -> list:
    """Classes that checkpoints of Vim, timm and mmengine hold beside tensors, and that run no code when unpickled."""
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    numpy_helpers = [
        (getattr(multiarray, name), f'numpy.{core}.multiarray.{name}')
        for name in ('_reconstruct', 'scalar')
        for core in ('core', '_core')  # as NumPy 1 and NumPy 2 write it
    ]
    dtypes = {type(np.dtype(code)) for code in '?bBhHiIlLqQefdFDSU'}
    return [
        argparse.Namespace,
        HistoryBuffer,
        (_method, 'builtins.getattr'),
        (ONE_CYCLE, ONE_CYCLE),  # its name, so that a file can call nothing but those two
        slice,
        np.ndarray,
        np.dtype,
        *numpy_helpers,
        *dtypes,
    ]


def read_checkpoint(path: str | os.PathLike, map_location: MapLocation = 'cpu') -> Any:
    """Read a .pth, .pt, .tar or .safetensors file; no code from the file is run.

    Args:
        path: the file.
        map_location: as in torch.load.

    Returns:
        What was saved; for a safetensors file, a dict of tensors.

    Raises:
        CheckpointError: if the file is missing, truncated, no checkpoint, or holds pickled objects of a class that is
            not known to be harmless. Such a file is never loaded with `weights_only=False`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = 'is a folder' if path.is_dir() else 'does not exist'
        raise CheckpointError(f"checkpoint '{path}' {what}: give the path of a .pth, .pt, .tar or .safetensors file")
    try:
        with path.open('rb') as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"checkpoint '{path}' cannot be read ({error.strerror}): check its permissions") from None
    if not head:
        raise CheckpointError(f"checkpoint '{path}' is empty: download or copy it again")
    if head.lstrip()[:1] == b'<':
        raise CheckpointError(f"'{path}' is a web page, not a checkpoint: download the file itself")
    if head.startswith(b'version ') and b'git-lfs' in head:
        raise CheckpointError(f"'{path}' is a Git LFS pointer, not the checkpoint: fetch it with git lfs pull")
    if path.suffix == '.safetensors' or head[8:10] == b'{"':
        return _read_safetensors(path, map_location)
    return read_object(path, map_location)


def _read_safetensors(path: Path, map_location: MapLocation) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"'{path}' needs the package safetensors: pip install safetensors") from None
    device = str(map_location) if isinstance(map_location, str | torch.device) else 'cpu'
    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def read_object(file: str | os.PathLike | BinaryIO, map_location: MapLocation = None, weights_only: bool = True) -> Any:
    """What torch.save wrote to a file or buffer; no code from it is run.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or if ``weights_only`` is False.
    """
    if weights_only is False:
        raise CheckpointError('weights_only=False lets a checkpoint run code: call torch.load if you trust its origin')
    path = file if isinstance(file, str | os.PathLike) else 'the checkpoint in memory'
    try:
        _check_records(file, contents=map_location != 'meta')
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        classes = set(re.findall(r'GLOBAL ([\w.]+)', str(error))) | set(re.findall(r'(getattr of .*)', str(error)))
        if not classes:
            raise _damaged(path, error) from None
        raise CheckpointError(
            f"checkpoint '{path}' holds pickled objects ({', '.join(sorted(classes))}) beside its weights; loading "
            'them could run code, so it is refused. If you trust where it comes from, save the weights alone: '
            'torch.save(torch.load(old, weights_only=False)["model"], new), with the key that holds them'
        ) from None
    except Exception as error:  # whatever can come of reading bytes that anyone may have written
        if 'deserialize' in str(error) or isinstance(error, torch.OutOfMemoryError):  # a device; torch has the remedy
            raise
        raise _damaged(path, error) from None


def check_intact(path: str | os.PathLike) -> None:
    """Compare a file with the checksums inside, if it has some.

    Raises:
        CheckpointError: if they differ.
    """
    try:
        _check_records(path, contents=True)
    except Exception as error:  # as many kinds as in `read_object`
        raise _damaged(path, error) from None


def _check_records(file: str | os.PathLike | BinaryIO, contents: bool) -> None:
    """Compare the checksums in a zip archive, which torch.save writes and torch.load does not read; 2 GB a second.

    Without `contents` only that of what is not a tensor.
    """
    start = None if isinstance(file, str | os.PathLike) else file.tell()
    if not zipfile.is_zipfile(file):
        wrong = None
    else:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if sum(r.file_size for r in records) > MAX_RATIO * sum(r.compress_size for r in records):
                raise ValueError(f'it unpacks to more than {MAX_RATIO} times its size')
            # all are 0 after torch.serialization.set_crc32_options(False)
            summed = any(r.CRC for r in records)
            wrong = archive.testzip() if contents and summed else None
            for record in (r for r in records if summed and not contents and r.filename.endswith('.pkl')):
                archive.read(record)  # raises an error if it differs
    if start is not None:
        file.seek(start)
    if wrong is not None:
        raise ValueError(f"the checksum of its record '{wrong}' is wrong")


def _damaged(path: str | os.PathLike, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0].partition('. ')[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"'{path}' is no checkpoint, or a damaged or incomplete one ({reason}): download it again")


def find_state_dict(checkpoint: Any, source: str | os.PathLike = 'the checkpoint') -> OrderedDict[str, Tensor]:
    """The weights of a checkpoint, by name, without the prefixes of wrappers such as `module.`.

    Args:
        checkpoint: what was read: weights by name, or a dict that holds them under one of `WEIGHT_KEYS`.
        source: the file, for messages.

    Raises:
        CheckpointError: if there are none.
    """
    found = checkpoint
    while isinstance(found, Mapping):
        inner = next((found[key] for key in WEIGHT_KEYS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    weights = {}
    if isinstance(found, Mapping):
        weights = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not weights:
        holds = f'the entries {list(map(str, found))[:8]}' if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(
            f"'{source}' holds no weights: found {holds}, expected weights by name or one of {WEIGHT_KEYS}. "
            'Give a checkpoint of a model'
        )
    state_dict = OrderedDict(weights)
    if getattr(found, '_metadata', None) is not None:
        state_dict._metadata = found._metadata
    while prefix := _wrapper_prefix(state_dict):
        state_dict = part_of(state_dict, prefix)
    name = model_name(checkpoint)
    if name is not None:
        metadata = OrderedDict(getattr(state_dict, '_metadata', {}))
        metadata[''] = {**metadata.get('', {}), MODEL_NAME: name}
        state_dict._metadata = metadata
    return state_dict


def part_of(state_dict: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    """The weights and metadata under a prefix that ends in a dot, by the names behind it.

    `torch.nn.modules.utils.consume_prefix_in_state_dict_if_present` keeps what has another name, and loses the metadata
    of a prefix with two dots.
    """
    part = OrderedDict((name.removeprefix(prefix), v) for name, v in state_dict.items() if name.startswith(prefix))
    if hasattr(state_dict, '_metadata'):
        part._metadata = OrderedDict(
            (f'{name}.'.removeprefix(prefix).rstrip('.'), value)
            for name, value in state_dict._metadata.items()
            if f'{name}.'.startswith(prefix)
        )
    return part


def model_name(checkpoint: Any) -> str | None:
    """The name by which the code that trained a model built it, where the file keeps that code's arguments."""
    arguments = checkpoint.get('args') if isinstance(checkpoint, Mapping) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    name = arguments.get('model') if isinstance(arguments, Mapping) else None
    return name if isinstance(name, str) and name else None


def facts_of_file(metadata: Mapping) -> dict:
    """What the metadata of a module tells of the whole file."""
    return {key: metadata[key] for key in (SOURCE, MODEL_NAME) if key in metadata}


def _wrapper_prefix(names: Iterable[str]) -> str | None:
    names = [name for name in names if name not in COUNTERS]
    return next((p for p in WRAPPER_PREFIXES if names and all(name.startswith(p) for name in names)), None)


def read_state_dict(path: str | os.PathLike, map_location: MapLocation = 'cpu') -> OrderedDict[str, Tensor]:
    """The weights in a file by name; see `read_checkpoint` and `find_state_dict`."""
    return find_state_dict(read_checkpoint(path, map_location), path)


def load_from_local(filename: str, map_location: MapLocation = None) -> dict:
    """As `read_checkpoint`, with the weights under `state_dict` in any case and the file in their metadata.

    Raises:
        CheckpointError: if the file cannot be read, or holds no weights.
    """
    return _with_facts(read_checkpoint(filename, map_location), filename)


def read_from_local(filename: str, map_location: MapLocation = None) -> Any:
    """Loader of local files for mmengine: as `load_from_local`.

    What is no mapping, such as a table of embeddings that a host reads this way, is returned as it is.
    """
    checkpoint = read_checkpoint(filename, map_location)
    return _with_facts(checkpoint, filename) if isinstance(checkpoint, Mapping) else checkpoint


def _with_facts(checkpoint: Any, filename: str) -> dict:
    rest, state_dict = {}, None
    if isinstance(checkpoint, Mapping):
        rest = {name: value for name, value in checkpoint.items() if not isinstance(value, Tensor)}
        state_dict = checkpoint.get('state_dict')
    if not isinstance(state_dict, OrderedDict) or _wrapper_prefix(state_dict):
        state_dict = find_state_dict(checkpoint, filename)
    metadata = getattr(state_dict, '_metadata', OrderedDict())
    name = model_name(checkpoint)
    facts = {SOURCE: str(filename)} if name is None else {SOURCE: str(filename), MODEL_NAME: name}
    for module in {'', 'backbone', *metadata}:
        metadata[module] = {**metadata.get(module, {}), **facts}
    state_dict._metadata = metadata
    return {**rest, 'state_dict': state_dict}


def read_from_http(
    filename: str, map_location: MapLocation = None, model_dir: str | None = None, progress: bool | None = None
) -> Any:
    """Loader of URLs for mmengine: download to the cache of torch.hub, once a node, then as `read_from_local`.

    Raises:
        CheckpointError: in every process, if the download failed in one; or if the file is none that can be read.
    """
    folder = Path(model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints'))
    # files of one name are common, such as model.safetensors of every repository
    target = folder / f'{hashlib.sha256(filename.encode()).hexdigest()[:8]}-{os.path.basename(urlparse(filename).path)}'
    rank, _ = get_dist_info()
    # first one process of all, then one on each node that sees another disk, then whoever still lacks the file
    for my_turn in (rank == 0, int(os.environ.get('LOCAL_RANK', rank)) == 0, True):
        failure = _download(filename, target, progress) if my_turn and not target.is_file() else None
        failures = [message for message in all_gather_object(failure) if message]
        if failures:
            raise CheckpointError(failures[0])
    try:
        return read_from_local(str(target), map_location)
    except CheckpointError as error:
        raise CheckpointError(f'{error}. The file was downloaded from {filename}: delete it first') from None


def _download(url: str, target: Path, progress: bool | None = None) -> str | None:
    """Download a file; returns what went wrong, if anything did."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=os.isatty(0) if progress is None else progress)
    except (OSError, HTTPException, ValueError) as error:
        return (
            f"'{url}' cannot be downloaded ({error}): check the address, or download it by other means and give the "
            'path of the file'
        )
    return None
