"""Vision state-space models as backbones for MMDetection, MMSegmentation and MMPretrain.

Importing this package is light: it loads torch and mmengine, but no host library, no Triton and no Numba. It does two
things that must happen before a config is read or MMDetection is imported: it teaches mmengine to resolve
`_base_ = 'mmvim::...'` (and `'mmseg::...'`), and it serves the ops of an mmcv without compiled ones from torchvision.
"""

from mmvim.compat import prepare_hosts
from mmvim.version import __version__

prepare_hosts()

__all__ = ['__version__']
