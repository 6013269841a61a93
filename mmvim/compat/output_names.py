"""A file of its own for every image that a host draws or predicts, whatever the image's folder and name.

The hosts name it after the image alone, so that `a/1.png` and `b/1.png`, or `1.png` and `1.jpg`, end in one file.
"""

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from types import ModuleType
from typing import Any

from mmvim.compat.import_hook import when_imported


class OutputNames:
    """Names of files for images. A name that another image has taken gets the image's folders in front of it."""

    def __init__(self) -> None:
        self._taken: dict[str, object] = {}  # file, regardless of case -> image
        self._stems: dict[str, str] = {}  # image -> stem of its files

    def announce(self, paths: Iterable[str], by_stem: bool = False) -> None:
        """Say which images will come: those of one name all get their folders below the common one.

        Args:
            paths: the images.
            by_stem: whether the files have a suffix of their own, so that 1.png and 1.jpg are one name.
        """
        groups, paths = defaultdict(set), {os.path.abspath(path) for path in paths}
        for path in paths:
            name = os.path.basename(path)
            groups[(os.path.splitext(name)[0] if by_stem else name).casefold()].add(path)
        root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ''
        used = {name for name, group in groups.items() if len(group) == 1}
        for path in sorted(path for group in groups.values() if len(group) > 1 for path in group):
            relative = os.path.relpath(path, root).replace(os.sep, '_')
            stem, suffix = os.path.splitext(relative)
            others = groups[os.path.splitext(os.path.basename(path))[0].casefold()] if by_stem else ()
            same = any(other != path and os.path.splitext(other)[0] == os.path.splitext(path)[0] for other in others)
            choices = chain([relative if same else stem], (f'{stem}_{number}' for number in count(2)))
            free = (choice for choice in choices if (choice if by_stem else choice + suffix).casefold() not in used)
            self._stems[path] = next(free)
            used.add((self._stems[path] if by_stem else self._stems[path] + suffix).casefold())

    def joined(self, name: str, path: str) -> str:
        """A name that contains the image's, with the stem that was announced in its place."""
        stem, own = self._stems.get(os.path.abspath(path)), os.path.splitext(os.path.basename(path))[0]
        return name if stem is None else name.replace(own, stem, 1)

    def of(self, file: str, path: str | None) -> str:
        """The file for an image.

        Args:
            file: where the host would write.
            path: the image; None for an array, which is a new one at every call.
        """
        folder, name = os.path.split(file)
        image: object = os.path.abspath(path) if path else object()
        stem = self._stems.get(os.path.abspath(path)) if path else None
        for candidate in _candidates(name, path, stem):
            key = os.path.abspath(os.path.join(folder, candidate)).casefold()
            if self._taken.setdefault(key, image) == image:
                return os.path.join(folder, candidate)
        raise AssertionError('there is always another number')


def _candidates(name: str, path: str | None, stem: str | None) -> Iterator[str]:
    own = os.path.splitext(os.path.basename(path or ''))[0]
    if stem is not None:
        yield stem + name[len(own) :] if name.startswith(own) else f'{stem}_{name}'
    else:
        yield name
    parent = os.path.dirname(os.path.abspath(path)) if path else ''
    while parent and os.path.basename(parent):
        name = f'{os.path.basename(parent)}_{name}'
        yield name
        parent = os.path.dirname(parent)
    start, suffix = os.path.splitext(name)
    yield from (f'{start}_{number}{suffix}' for number in count(2))


def names_of(owner: Any) -> OutputNames:
    """The names that a visualizer, metric or inferencer has given."""
    if not hasattr(owner, '_output_names'):
        owner._output_names = OutputNames()
    return owner._output_names


def keep_outputs_apart() -> None:
    """Put the functions below in place, whether the hosts are imported already or only later."""
    when_imported('mmdet.visualization.local_visualizer', _change_mmdet)
    when_imported('mmseg.visualization.local_visualizer', _change_mmseg)
    when_imported('mmpretrain.visualization.visualizer', _change_mmpretrain)
    when_imported('mmdet.apis.det_inferencer', _change_inferencer)


def _change_mmdet(host: ModuleType) -> None:
    host.DetLocalVisualizer.add_datasample = _apart(host.DetLocalVisualizer.add_datasample)


def _change_mmseg(host: ModuleType) -> None:
    host.SegLocalVisualizer.add_datasample = _apart(host.SegLocalVisualizer.add_datasample)


def _change_mmpretrain(host: ModuleType) -> None:
    host.UniversalVisualizer.visualize_cls = _apart(host.UniversalVisualizer.visualize_cls)


def _apart(draw: Callable) -> Callable:
    """A method of a visualizer whose `out_file` is the image's own."""

    @functools.wraps(draw)
    def call(self, *args, **kwargs):
        samples = (sample for sample in (*args, *kwargs.values()) if hasattr(sample, 'metainfo_keys'))
        path = next((sample.get('img_path') for sample in samples), None)
        file = kwargs.get('out_file')
        if file is not None and _is_named_after(str(file), path):
            kwargs['out_file'] = names_of(self).of(str(kwargs['out_file']), path)
        elif file is None and path and args and isinstance(args[0], str):  # a backend makes the file's name of this one
            args = (names_of(self).joined(args[0], path), *args[1:])
        return draw(self, *args, **kwargs)

    return call


def _is_named_after(file: str, path: str | None) -> bool:
    """Whether a host made up a file's name; one that a user chose stays, even for two images."""
    name = os.path.basename(file)
    return os.path.splitext(name)[0].isdigit() if path is None else os.path.basename(path).split('.')[0] in name


def _change_inferencer(host: ModuleType) -> None:
    original = host.DetInferencer.pred2dict

    @functools.wraps(original)
    def pred2dict(self, data_sample, pred_out_dir: str = '') -> dict:
        path = data_sample.get('img_path')
        if pred_out_dir and path:
            stem = os.path.splitext(os.path.basename(path))[0]
            name = names_of(self).of(os.path.join(pred_out_dir, 'preds', f'{stem}.json'), path)
            data_sample = data_sample.clone()
            data_sample.set_metainfo(dict(img_path=os.path.basename(name)))
        return original(self, data_sample, pred_out_dir)

    host.DetInferencer.pred2dict = pred2dict
