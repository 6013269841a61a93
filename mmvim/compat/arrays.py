"""The hosts' inferencers take arrays of one or four channels, and of other types than uint8, as they take files.

Their loaders hand an array on as it is: grey ones end in an IndexError of the preprocessor, those of 16 bits in
predictions for a picture that is all white.
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np

from mmvim.compat.import_hook import when_imported

LOADERS = ('mmdet.datasets.transforms.loading', 'mmseg.datasets.transforms.loading')
INFERENCERS = {
    'mmdet.apis.det_inferencer': 'DetInferencer',
    'mmseg.apis.mmseg_inferencer': 'MMSegInferencer',
    'mmpretrain.apis.image_classification': 'ImageClassificationInferencer',
}


def take_any_array() -> None:
    """Change the loaders and inferencers when they are imported."""
    for name in LOADERS:
        when_imported(name, _change_loaders)
    for name in INFERENCERS:
        when_imported(name, _change_inferencer)


def _change_loaders(host: ModuleType) -> None:
    loader, of_inferencer = host.LoadImageFromNDArray, host.InferencerLoader
    init, transform, init_of_inferencer = loader.__init__, loader.transform, of_inferencer.__init__

    def new_init(self, *args, value_range=None, **kwargs) -> None:
        init(self, *args, **kwargs)
        self.value_range = value_range

    def new_transform(self, results: dict) -> dict:
        from mmvim.pixels import image_of_array

        if self.color_type.startswith('color'):  # others are for models of other numbers of channels
            results = {**results, 'img': image_of_array(results['img'], self.value_range)}
        return transform(self, results)

    def new_init_of_inferencer(self, value_range=None, **kwargs) -> None:
        init_of_inferencer(self, **kwargs)
        if value_range is not None:  # a setting of our loader, whose type the inferencers replace
            self.from_file = host.TRANSFORMS.build(
                dict(type='mmvim.LoadImageFromFile', value_range=value_range, **kwargs)
            )
            self.from_ndarray.value_range = value_range

    loader.__init__, loader.transform, of_inferencer.__init__ = new_init, new_transform, new_init_of_inferencer


def _change_inferencer(host: ModuleType) -> None:
    inferencer = getattr(host, INFERENCERS[host.__name__])
    to_list: Callable = inferencer._inputs_to_list

    def inputs_to_list(self, inputs: object, *args, **kwargs) -> list:
        """The host's, with arrays as images: pictures are drawn on them too."""
        from mmvim.pixels import image_of_array, three_channels

        mean = getattr(getattr(self.model, 'data_preprocessor', None), 'mean', None)
        if mean is None or len(mean) != 3:  # for other numbers of channels
            return to_list(self, inputs, *args, **kwargs)
        # MMPretrain's has no loader that would see to the values
        convert = image_of_array if host.__name__.startswith('mmpretrain') else three_channels
        listed = to_list(self, inputs, *args, **kwargs)
        return [convert(entry) if isinstance(entry, np.ndarray) else entry for entry in listed]

    inferencer._inputs_to_list = inputs_to_list
