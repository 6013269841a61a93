"""The demo data set of drawn shapes as label maps, for MMSegmentation."""

from mmseg.datasets import BaseSegDataset

from mmvim.arguments import check_choice
from mmvim.datasets.shapes import CLASSES, PALETTE, SPLITS, ensure_shapes
from mmvim.registry import DATASETS


@DATASETS.register_module()
class ShapesSegDataset(BaseSegDataset):
    """Label maps of the demo data set of drawn shapes, which is generated into its folder on first use.

    Class 0 is the background.

    Args:
        split: 'train' or 'val'.
        data_root: folder of the data set; generated when it is missing or empty.
        shapes: arguments of :func:`mmvim.datasets.shapes.shapes_recipe` other than their defaults.
        kwargs: arguments of BaseSegDataset.

    Raises:
        ValueError: if there is no such split, or an argument of the recipe is illegal.
        FileExistsError: if the folder holds other files, or shapes generated with other arguments.
    """

    METAINFO = dict(classes=('background', *CLASSES), palette=[[0, 0, 0], *(list(colour) for colour in PALETTE)])

    def __init__(
        self, split: str = 'train', data_root: str = 'data/shapes', shapes: dict | None = None, **kwargs
    ) -> None:
        check_choice('split', split, SPLITS)
        ensure_shapes(data_root, **(shapes or {}))
        super().__init__(
            data_root=data_root,
            data_prefix=dict(img_path=split, seg_map_path=f'label_maps/{split}'),
            img_suffix='.png',
            seg_map_suffix='.png',
            **kwargs,
        )
