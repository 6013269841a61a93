"""A folder of images per class, for MMPretrain."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log
from mmpretrain.datasets import CustomDataset

from mmvim.arguments import check_flags
from mmvim.datasets.class_folders import class_folders, files_below
from mmvim.datasets.image_files import IMAGES, check_depth, decode, in_time, problem, read_header
from mmvim.errors import DataError
from mmvim.registry import DATASETS

SECONDS = 30.0  # for looking at images, at most
WARNING = 30


@DATASETS.register_module()
class ClassFolderDataset(CustomDataset):
    """A folder that holds a folder of images for each class.

    The class names are those of the folders, sorted, or the given ones, so that the validation folder may lack some.
    Images may lie in folders of their own below that of their class. All files are looked at before a run, but for at
    most 30 seconds.

    Args:
        data_root: folder of the data set.
        data_prefix: the folder that holds the class folders, absolute or relative to data_root.
        metainfo: may hold ``classes``, the class names in the order of the model's outputs.
        only_classes: leave out folders that ``classes`` does not name; otherwise they are refused.
        skip_bad_images: look at all images, however long it takes, leave out those that cannot be read, and log them;
            otherwise the first one ends the run.
        extensions: suffixes of images.
        kwargs: arguments of MMPretrain's CustomDataset.

    Raises:
        DataError: if something is missing or wrong; the message names the file.
    """

    def __init__(
        self,
        data_root: str = '',
        data_prefix: str | dict = '',
        metainfo: dict | None = None,
        only_classes: bool = False,
        skip_bad_images: bool = False,
        extensions: Sequence[str] = IMAGES,
        **kwargs,
    ) -> None:
        check_flags(only_classes=only_classes, skip_bad_images=skip_bad_images)
        for refused in ('ann_file', 'with_label'):
            if kwargs.get(refused) not in (None, '', True):
                raise DataError(f"ClassFolderDataset has no {refused}: use MMPretrain's CustomDataset")
        if not data_root and not data_prefix:
            raise DataError('no image folder: set data_root, train_img and val_img, or give this data set data_root')
        self.only_classes, self.skip_bad_images = only_classes, skip_bad_images
        super().__init__(
            data_root=data_root, data_prefix=data_prefix, metainfo=metainfo, extensions=extensions, **kwargs
        )

    def _find_samples(self) -> list[tuple[str, int]]:
        """Images, relative to the folder, and the index of the class of each."""
        root = self.img_prefix
        folders = class_folders(root)
        given = self.CLASSES
        names = folders if given is None else (given,) if isinstance(given, str) else given
        self._metainfo['classes'] = tuple(map(str, names))
        self._compare(folders, list(self.CLASSES))
        self.folder_to_idx = {name: index for index, name in enumerate(self.CLASSES) if name in folders}
        samples = [
            (path, index) for name, index in self.folder_to_idx.items() for path in self._images(Path(root, name))
        ]
        self._warn_of_strays(root, folders)
        if not samples:
            raise DataError(
                f"the class folders of '{root}' ({', '.join(folders[:5])}) hold no image that ends in "
                f'{", ".join(sorted(self.extensions))}: add images, or set extensions'
            )
        samples = self._usable(samples)
        counts = Counter(index for _, index in samples)
        empty = [name for index, name in enumerate(self.CLASSES) if not counts[index]]
        if empty:
            effect = 'missing from the metrics' if self.test_mode else 'not learnt'
            print_log(f"no image of {', '.join(empty)} in '{root}': {effect}", 'current', WARNING)
        return [(os.path.relpath(path, root), index) for path, index in samples]

    def _compare(self, folders: tuple[str, ...], classes: list[str]) -> None:
        if len(classes) < 2:
            raise DataError(
                f"'{self.img_prefix}' has one class, {classes[0] if classes else 'none'}: there is nothing to learn "
                'with fewer than two; add a folder of images of something else'
            )
        if len(set(classes)) < len(classes):
            twice = next(name for name, count in Counter(classes).items() if count > 1)
            raise DataError(f'classes names {twice!r} twice: give each class once')
        unknown = [name for name in folders if name not in classes]
        if unknown and self.only_classes:
            print_log(f"folders of '{self.img_prefix}' that classes does not name are left out: {unknown}", 'current')
        elif unknown:
            known = {name.strip().lower(): name for name in classes}
            close = known.get(unknown[0].strip().lower())
            hint = f' (there is {close!r}, which differs in case or blanks)' if close else ''
            raise DataError(
                f"'{self.img_prefix}' has folders of classes that the model does not know: {unknown[:10]}{hint}; it "
                f'knows {classes[:10]}: rename or remove them, or train with a folder that has them'
            )
        if not set(classes) & set(folders) or (
            self.only_classes and not self.test_mode and set(classes) - set(folders)
        ):
            missing = [name for name in classes if name not in folders]
            raise DataError(
                f"'{self.img_prefix}' has no folder for the classes {missing[:10]}: it has {list(folders[:10])}"
            )

    def _images(self, folder: Path) -> list[str]:
        files = list(files_below(folder))
        left_out = Counter(path.suffix or path.name for path in files if not self.is_valid_file(path.name))
        if left_out:
            kinds = ', '.join(f"{count} '{kind}'" for kind, count in left_out.most_common(5))
            print_log(
                f"'{folder}' has files that are no images and are left out, by suffix: {kinds}; images end in "
                f'{", ".join(sorted(self.extensions))}',
                'current',
                WARNING,
            )
        return [str(path) for path in files if self.is_valid_file(path.name)]

    def _warn_of_strays(self, root: str, folders: tuple[str, ...]) -> None:
        stray = sorted(name for name in set(os.listdir(root)) - set(folders) if self.is_valid_file(name))
        if stray:
            print_log(f"{len(stray)} images of '{root}' are in no class folder: '{stray[0]}'", 'current', WARNING)

    def _usable(self, samples: list[tuple[str, int]]) -> list[tuple[str, int]]:
        order = range(len(samples)) if self.skip_bad_images else np.random.default_rng(0).permutation(len(samples))
        loader = next((step for step in self.pipeline.transforms if hasattr(step, 'imdecode_backend')), None)
        problems = in_time(
            lambda i: (i, _trouble(samples[i][0], loader)), order, float('inf') if self.skip_bad_images else SECONDS
        )
        bad = sorted((samples[i][0], text) for i, text in problems if text)
        if bad and not self.skip_bad_images:
            count = f'{len(bad)} of {len(samples)} images cannot be used, the first: ' if bad[1:] else ''
            raise DataError(f'{count}{bad[0][1]}; skip_bad_images=True leaves such images out')
        if len(problems) < len(samples):
            print_log(f'{len(problems)} of {len(samples)} images looked at in {SECONDS:.0f} s', 'current')
        if bad:
            names = [path for path, _ in bad]
            print_log(f'{len(bad)} of {len(samples)} images are unusable and left out: {names}', 'current', WARNING)
        if len(bad) == len(samples):
            raise DataError(f"none of the {len(bad)} images of '{self.img_prefix}' can be used; the first: {bad[0][1]}")
        gone = {path for path, _ in bad}
        return [sample for sample in samples if sample[0] not in gone]


def _trouble(path: str, loader: Any) -> str | None:
    """What is wrong with an image file; None if nothing is."""
    reason = problem(path)
    if reason:
        return f"image '{path}' {reason}"
    try:
        header = read_header('image', path)
        if header is None:
            decode(path)
        check_depth(path, header, loader)
    except DataError as error:
        return str(error)
    return None
