"""MambaVision: the network, its mixer and its weights."""

from mmvim.models.backbones.mambavision.mixer import MambaVisionMixer, attention_places
from mmvim.models.backbones.mambavision.model import MambaVision

__all__ = ['MambaVision', 'MambaVisionMixer', 'attention_places']
