"""Backbones, necks and layers; needs torch, mmengine and mmcv, but no host library."""

from mmvim.models import layers
from mmvim.models.backbones import HierVim, MambaVision, VisionMamba, VisionTransformer
from mmvim.models.backbones.mambavision.mixer import MambaVisionMixer
from mmvim.models.layers import LayerNorm2d
from mmvim.models.necks import SimpleFPN
from mmvim.moved import keep_paths

keep_paths(
    {
        'mmvim.models.backbones.vision_mamba': 'mmvim.models.backbones.vim.model',
        'mmvim.models.backbones.vision_transformer': 'mmvim.models.backbones.vit.model',
        'mmvim.models.layers.mambavision_mixer': 'mmvim.models.backbones.mambavision.mixer',
    }
)
vars(layers)['MambaVisionMixer'] = MambaVisionMixer  # it stood there

__all__ = ['HierVim', 'LayerNorm2d', 'MambaVision', 'SimpleFPN', 'VisionMamba', 'VisionTransformer']
