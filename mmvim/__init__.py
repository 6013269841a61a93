"""Vision state-space models as backbones for MMDetection, MMSegmentation and MMPretrain.

Importing this package is light: it loads torch and mmengine, but no host library, no Triton and no Numba. It changes
in mmengine and mmcv what `mmvim.compat.install` lists, which must happen before a config is read or MMDetection is
imported.
"""

from mmvim.compat import install
from mmvim.version import __version__

install()

__all__ = ['__version__']
