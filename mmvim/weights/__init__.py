"""Weights: reading files safely, fitting them to a backbone, telling how they fit. Knows no model and no host."""

from mmvim.weights.classifier import fit_to_classifier, to_classifier
from mmvim.weights.family import Family, Identity, Known, Words, load_published
from mmvim.weights.fitting import Conversion, LoadReport, compare, convert_on_load
from mmvim.weights.reading import find_state_dict, read_checkpoint, read_state_dict
from mmvim.weights.settings import HiddenSetting

__all__ = [
    'Conversion',
    'Family',
    'HiddenSetting',
    'Identity',
    'Known',
    'LoadReport',
    'Words',
    'compare',
    'convert_on_load',
    'find_state_dict',
    'fit_to_classifier',
    'load_published',
    'read_checkpoint',
    'read_state_dict',
    'to_classifier',
]
