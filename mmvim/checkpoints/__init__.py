"""The names by which `mmvim.weights` and the `weights.py` of each backbone could be imported before; they still can."""

from mmvim.models.backbones.hier_vim.weights import hier_vim_state_dict
from mmvim.models.backbones.mambavision.weights import mambavision_state_dict
from mmvim.models.backbones.vim.weights import vim_state_dict
from mmvim.models.backbones.vit.weights import deit_state_dict
from mmvim.moved import keep_paths
from mmvim.weights import (
    Conversion,
    LoadReport,
    compare,
    convert_on_load,
    find_state_dict,
    fit_to_classifier,
    load_published,
    read_checkpoint,
    read_state_dict,
    to_classifier,
)

load_hier_vim = load_published_deit = load_published_mambavision = load_published_vim = load_published

keep_paths(
    {f'{__name__}.{name}': f'mmvim.weights.{name}' for name in ('classifier', 'fitting', 'reading', 'settings')}
    | {f'{__name__}.{name}': f'mmvim.models.backbones.{name}.weights' for name in ('hier_vim', 'mambavision', 'vim')}
    | {f'{__name__}.deit': 'mmvim.models.backbones.vit.weights', f'{__name__}.identify': 'mmvim.models.identify'}
)

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
