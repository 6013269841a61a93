"""The backbone of a config, and its weights in a file of any model that has one."""

from collections import OrderedDict
from collections.abc import Mapping

from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmvim.errors import ConfigError
from mmvim.weights.reading import part_of

PREFIX = 'backbone.'


def backbone_weights(state_dict: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """Split the weights of a whole model into its backbone's and the rest.

    Metadata that the backbone saved with its weights (grid, class tokens) stay with them.

    Args:
        state_dict: weights of a backbone, of a published classifier, or of a model that has a `backbone`.

    Returns:
        The backbone's weights by its own names, and the names of all others.
    """
    if not any(name.startswith(PREFIX) for name in state_dict):
        return OrderedDict(state_dict) if not hasattr(state_dict, '_metadata') else state_dict, []
    return part_of(state_dict, PREFIX), [name for name in state_dict if not name.startswith(PREFIX)]


def model_of(cfg: Config) -> ConfigDict:
    """The model of a config, in whose scope it can be built then.

    Raises:
        ConfigError: if it has no backbone.
    """
    if not isinstance(cfg.get('model'), dict) or 'backbone' not in cfg.model:
        raise ConfigError('the config has no model.backbone: give one of a detector, segmentor or classifier')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return cfg.model


def image_size(backbone: nn.Module) -> tuple[int, int] | None:
    """Height and width for which a backbone stores positions, pixels; None if it stores none."""
    if not hasattr(backbone, 'grid'):
        return None
    embed = backbone.patch_embed
    return tuple((n - 1) * embed.patch_stride + embed.patch_size for n in backbone.grid)
