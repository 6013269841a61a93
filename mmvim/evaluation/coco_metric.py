"""COCO metric for data sets that know their own annotation file."""

from collections.abc import Sequence

from mmdet.evaluation import CocoMetric
from mmengine.logging import print_log

from mmvim.datasets.coco import CheckedCOCO
from mmvim.errors import ConfigError, DataError
from mmvim.registry import METRICS


@METRICS.register_module()
class CocoFolderMetric(CocoMetric):
    """MMDetection's CocoMetric for :class:`mmvim.CocoFolderDataset`.

    It takes the annotation file from the data set, looks categories up by name, and evaluates the images that were
    tested, so that images left out by ``skip_bad_images`` do not count as missed. The file is read when the data set
    is known, so that a file which cannot be evaluated ends the run before the first prediction.

    Args:
        kwargs: arguments of CocoMetric without ``ann_file``.
    """

    def __init__(self, **kwargs) -> None:
        if kwargs.get('format_only') and not kwargs.get('outfile_prefix'):
            raise ConfigError('format_only=True writes predictions only: set outfile_prefix to where they go')
        super().__init__(ann_file=None, **kwargs)

    @property
    def dataset_meta(self) -> dict | None:
        """Metainfo of the data set that is evaluated.

        Raises:
            DataError: when it is set, if the data set has no annotations to compare predictions with.
        """
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, metainfo: dict | Sequence[dict]) -> None:
        if not isinstance(metainfo, dict):
            files = [part.get('ann_file') for part in metainfo]
            raise DataError(
                f'mmvim.CocoFolderMetric evaluates one annotation file, not {files} joined: merge the files'
            )
        self._dataset_meta = metainfo
        path = metainfo.get('ann_file')
        if path is None:
            raise ConfigError(
                'mmvim.CocoFolderMetric needs mmvim.CocoFolderDataset with test_mode=True: set it in val_dataloader '
                'and test_dataloader, or use mmdet.CocoMetric'
            )
        with_masks = 'segm' in self.metrics and not self.format_only
        self._coco_api = CheckedCOCO(path, with_masks=with_masks, with_truth=not self.format_only)
        content = self._coco_api.dataset
        if not (content['annotations'] or self.format_only):
            print_log(f"annotation file '{path}' has no annotations to compare with: metrics will be -1", 'current', 30)
        compared = {entry['id'] for entry in content['categories'] if entry['name'] in metainfo['classes']}
        entries = [entry for entry in content['annotations'] if entry['category_id'] in compared]
        bare = [entry['id'] for entry in entries if not entry.get('segmentation')]
        if with_masks and bare:
            raise DataError(
                f"annotation file '{path}': {len(bare)} annotations have no 'segmentation' (first: {bare[0]})"
                ", which the metric 'segm' compares: add masks, or set metric='bbox' in val_evaluator"
            )

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics of all predictions; keys as in CocoMetric."""
        self.cat_ids = None
        self.img_ids = sorted({prediction['img_id'] for _, prediction in results})
        return super().compute_metrics(results)
