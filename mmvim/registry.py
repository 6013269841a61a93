"""The only place where mmvim's parts are registered.

Every registry is a child of mmengine's root with scope `mmvim`, so `type='mmvim.VisionMamba'` builds from an
MMDetection, MMSegmentation or MMPretrain config with no import line: mmengine imports the locations below on first use.
"""

from importlib import import_module

from mmengine.registry import DATA_SAMPLERS as ROOT_DATA_SAMPLERS
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.registry import EVALUATOR as ROOT_EVALUATOR
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import LOG_PROCESSORS as ROOT_LOG_PROCESSORS
from mmengine.registry import LOOPS as ROOT_LOOPS
from mmengine.registry import METRICS as ROOT_METRICS
from mmengine.registry import MODEL_WRAPPERS as ROOT_MODEL_WRAPPERS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as ROOT_OPTIM_WRAPPERS
from mmengine.registry import OPTIMIZERS as ROOT_OPTIMIZERS
from mmengine.registry import PARAM_SCHEDULERS as ROOT_PARAM_SCHEDULERS
from mmengine.registry import RUNNERS as ROOT_RUNNERS
from mmengine.registry import TASK_UTILS as ROOT_TASK_UTILS
from mmengine.registry import TRANSFORMS as ROOT_TRANSFORMS
from mmengine.registry import VISBACKENDS as ROOT_VISBACKENDS
from mmengine.registry import VISUALIZERS as ROOT_VISUALIZERS
from mmengine.registry import WEIGHT_INITIALIZERS as ROOT_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

SCOPE = 'mmvim'

# Parts derived from a host's classes. Their modules are imported when one is asked for by name, not with the locations
# below: a segmentation or classification config then never loads MMDetection.
HOST_PARTS = {
    'CascadeRoIHead': 'mmvim.models.heads.cascade_roi_head',
    'AllBoxesSampler': 'mmvim.models.heads.cascade_roi_head',
    'TokenMaxClsHead': 'mmvim.models.heads.token_max_cls_head',
    'InstanceTTAModel': 'mmvim.models.test_time_augs',
    'CocoFolderDataset': 'mmvim.datasets.coco',
    'ShapesDataset': 'mmvim.datasets.coco',
    'ClassFolderDataset': 'mmvim.datasets.classification',
    'ShapesSegDataset': 'mmvim.datasets.shapes_segmentation',
    'Resize': 'mmvim.datasets.detection_transforms',
    'CocoFolderMetric': 'mmvim.evaluation.coco_metric',
    'EnlargingDetVisualizer': 'mmvim.visualization.enlarging',
}


class _ChildRegistry(Registry):
    def get(self, key: str) -> type | None:
        part = key.removeprefix(f'{SCOPE}.')
        if part in HOST_PARTS and part not in self._module_dict:
            import_module(HOST_PARTS[part])
        return super().get(key)


def _child(name: str, parent: Registry, location: str) -> Registry:
    return _ChildRegistry(name, parent=parent, scope=SCOPE, locations=[location])


MODELS = _child('model', ROOT_MODELS, 'mmvim.models')
MODEL_WRAPPERS = _child('model wrapper', ROOT_MODEL_WRAPPERS, 'mmvim.models')
WEIGHT_INITIALIZERS = _child('weight initializer', ROOT_WEIGHT_INITIALIZERS, 'mmvim.models')
TASK_UTILS = _child('task util', ROOT_TASK_UTILS, 'mmvim.models')

DATASETS = _child('dataset', ROOT_DATASETS, 'mmvim.datasets')
DATA_SAMPLERS = _child('data sampler', ROOT_DATA_SAMPLERS, 'mmvim.datasets')
TRANSFORMS = _child('transform', ROOT_TRANSFORMS, 'mmvim.datasets')

HOOKS = _child('hook', ROOT_HOOKS, 'mmvim.engine')
LOOPS = _child('loop', ROOT_LOOPS, 'mmvim.engine')
RUNNERS = _child('runner', ROOT_RUNNERS, 'mmvim.engine')
LOG_PROCESSORS = _child('log processor', ROOT_LOG_PROCESSORS, 'mmvim.engine')
OPTIMIZERS = _child('optimizer', ROOT_OPTIMIZERS, 'mmvim.engine')
OPTIM_WRAPPERS = _child('optim wrapper', ROOT_OPTIM_WRAPPERS, 'mmvim.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child('optim wrapper constructor', ROOT_OPTIM_WRAPPER_CONSTRUCTORS, 'mmvim.engine')
PARAM_SCHEDULERS = _child('parameter scheduler', ROOT_PARAM_SCHEDULERS, 'mmvim.engine')

METRICS = _child('metric', ROOT_METRICS, 'mmvim.evaluation')
EVALUATOR = _child('evaluator', ROOT_EVALUATOR, 'mmvim.evaluation')

VISUALIZERS = _child('visualizer', ROOT_VISUALIZERS, 'mmvim.visualization')
VISBACKENDS = _child('visualization backend', ROOT_VISBACKENDS, 'mmvim.visualization')
