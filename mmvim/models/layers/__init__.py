"""Layers that the backbones are made of."""

from mmvim.models.layers.norm import LayerNorm2d
from mmvim.models.layers.patch_embed import PatchEmbed
from mmvim.models.layers.rotary import RotaryEmbedding2d
from mmvim.models.layers.transformer import Mlp, SelfAttention
from mmvim.models.layers.vim_mixer import VimMixer

__all__ = ['LayerNorm2d', 'Mlp', 'PatchEmbed', 'RotaryEmbedding2d', 'SelfAttention', 'VimMixer']
