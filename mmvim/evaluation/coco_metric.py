"""COCO metric for data sets that know their own annotation file."""

from collections.abc import Sequence

from mmdet.evaluation import CocoMetric

from mmvim.datasets.coco import CheckedCOCO
from mmvim.registry import METRICS


@METRICS.register_module()
class CocoFolderMetric(CocoMetric):
    """MMDetection's CocoMetric for :class:`mmvim.CocoFolderDataset`.

    It takes the annotation file from the data set, looks categories up by name, and evaluates the images that were
    tested, so that images left out by ``skip_bad_images`` do not count as missed.

    Args:
        kwargs: arguments of CocoMetric without ``ann_file``.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(ann_file=None, **kwargs)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep the predictions of one batch."""
        if self._coco_api is None:
            self._coco_api = CheckedCOCO(self.dataset_meta['ann_file'])
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics of all predictions; keys as in CocoMetric."""
        self.cat_ids = None
        self.img_ids = sorted({prediction['img_id'] for _, prediction in results})
        return super().compute_metrics(results)
