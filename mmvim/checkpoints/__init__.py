"""Reading published checkpoints safely and fitting them to the models here."""

import mmvim.checkpoints.host_loading  # noqa: F401  (makes the hosts load files as this package does)
from mmvim.checkpoints.classifier import fit_to_classifier, to_classifier
from mmvim.checkpoints.deit import deit_state_dict, load_published_deit
from mmvim.checkpoints.fitting import Conversion, LoadReport, compare, convert_on_load
from mmvim.checkpoints.hier_vim import hier_vim_state_dict, load_hier_vim
from mmvim.checkpoints.mambavision import load_published_mambavision, mambavision_state_dict
from mmvim.checkpoints.reading import find_state_dict, read_checkpoint, read_state_dict
from mmvim.checkpoints.vim import load_published_vim, vim_state_dict

__all__ = [
    'Conversion',
    'LoadReport',
    'compare',
    'convert_on_load',
    'deit_state_dict',
    'find_state_dict',
    'fit_to_classifier',
    'hier_vim_state_dict',
    'load_hier_vim',
    'load_published_deit',
    'load_published_mambavision',
    'load_published_vim',
    'mambavision_state_dict',
    'read_checkpoint',
    'read_state_dict',
    'to_classifier',
    'vim_state_dict',
]
