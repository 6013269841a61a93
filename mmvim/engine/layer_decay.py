"""Layer-wise learning rates and weight decay for every backbone of this package, in all hosts."""

import difflib
import fnmatch
from collections.abc import Callable

from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm, _InstanceNorm
from torch import nn

from mmvim.arguments import check_choice
from mmvim.registry import OPTIM_WRAPPER_CONSTRUCTORS

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
SCOPES = ('all', 'embedding')
KEYS = {
    'decay_rate', 'decay_scope', 'no_decay', 'norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult', 'custom_keys',
}  # fmt: skip
EMBEDDINGS = {'pos_embed', 'cls_token', 'cls_token_head', 'cls_token_tail'}
# Which of the names that backbones declare keep no weight decay; None for all.
NO_DECAY = dict(declared=None, embeddings=EMBEDDINGS, positions={'pos_embed'}, none=set())
CUSTOM = {'lr_mult', 'decay_mult'}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Give each parameter the learning rate of its depth, and no weight decay where a backbone declares none.

    A parameter of a module with ``get_layer_depth`` at depth i of n gets the learning rate times
    ``decay_rate ** (n - 1 - i)``; all others get the full rate. Names in the module's ``no_weight_decay()``, biases,
    norms and other one-dimensional parameters get no weight decay unless set otherwise.

    ``paramwise_cfg`` may hold:

    - ``decay_rate`` (float): factor from one depth to the one before it, in (0, 1]. Defaults to 1, no decay.
    - ``decay_scope`` (str): 'all' (default), or 'embedding' to lower the rate of depth 0 alone, the patch embedding
      and positions, which is what the released Vim segmentation recipe does in fact (see configs/vim/README.md).
    - ``no_decay`` (str): which of the names in ``no_weight_decay()`` get none: 'declared' (default), all of them;
      'embeddings', positions and class tokens, as timm has it in DeiT's recipe; 'positions' alone, as detectron2's
      ViTDet has it; 'none', as BEiT's segmentation recipe has it. The others are treated by their dimensions, so
      that with the default factors below a ``D`` of Mamba, which has one, gets no weight decay in any case.
    - ``norm_decay_mult``, ``bias_decay_mult``, ``flat_decay_mult`` (float): factor on the weight decay of norms,
      biases, and other one-dimensional parameters. Default to 0.
    - ``custom_keys`` (dict): parts of parameter names to ``dict(lr_mult=..., decay_mult=...)``, as in mmengine's own
      constructor: a key fits every name that contains it, and of several that fit the longest wins. A key with one of
      ``*?[`` is a shell-style pattern of the whole name instead. The layer's factor stays in force beside lr_mult, and
      so does the weight decay of above where decay_mult is not given.

    Raises:
        ValueError: if paramwise_cfg holds an unknown key or a value out of range, if a custom key fits no parameter, or
            if decay_rate is below 1 and no module of the model has ``get_layer_depth``.

    Example:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.1),
        ...     constructor='mmvim.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(decay_rate=0.837, custom_keys={'*.relative_position_*': dict(decay_mult=0)}))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        # mmengine skips add_params for an empty paramwise_cfg, and with it the declared no-decay set.
        super().__init__(optim_wrapper_cfg, {'decay_rate': 1.0, **(paramwise_cfg or {})})

    def _validate_cfg(self) -> None:
        unknown = set(self.paramwise_cfg) - KEYS
        if unknown:
            raise ValueError(f'paramwise_cfg does not know {sorted(unknown)}; it may hold {sorted(KEYS)}')
        rate = self.paramwise_cfg['decay_rate']
        if type(rate) not in (int, float) or not 0 < rate <= 1:
            raise ValueError(f'decay_rate must be in (0, 1], got {rate!r}')
        for key in ('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult'):
            factor = self.paramwise_cfg.get(key, 0.0)
            if type(factor) not in (int, float) or not 0 <= factor:
                raise ValueError(f'{key} must be a number of at least 0, got {factor!r}')
        check_choice('decay_scope', self.paramwise_cfg.get('decay_scope', 'all'), SCOPES)
        check_choice('no_decay', self.paramwise_cfg.get('no_decay', 'declared'), NO_DECAY)
        if self.paramwise_cfg.get('decay_scope') == 'embedding' and rate == 1:
            raise ValueError("decay_scope='embedding' needs a decay_rate below 1: set it, or leave decay_scope out")
        if not isinstance(self.paramwise_cfg.get('custom_keys') or {}, dict):
            raise ValueError(f'custom_keys must be a dict, got {self.paramwise_cfg["custom_keys"]!r}')
        for key, custom in (self.paramwise_cfg.get('custom_keys') or {}).items():
            if not isinstance(custom, dict) or not set(custom) <= CUSTOM:
                raise ValueError(f'custom_keys[{key!r}] may be a dict with {sorted(CUSTOM)}, got {custom!r}')
        super()._validate_cfg()

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append one group per pair of learning rate and weight decay that occurs in ``module``, largest rate first."""
        depth_of, undecayed = self._declarations(module)
        cfg = self.paramwise_cfg
        if cfg['decay_rate'] < 1 and not depth_of:
            raise ValueError(
                f'decay_rate={cfg["decay_rate"]} needs a backbone with get_layer_depth, which no module of '
                f'{type(module).__name__} has: use a backbone of mmvim or mmpretrain, or leave decay_rate out'
            )
        self._check_custom_keys(module)
        groups: dict[tuple[float, float], dict] = {}
        seen = set()
        for prefix, owner in module.named_modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                name = f'{prefix}.{leaf}' if prefix else leaf
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                lr_mult, decay_mult = self._factors(name, leaf, parameter, owner, depth_of, undecayed)
                group = groups.setdefault((lr_mult, decay_mult), dict(params=[], param_names=[]))
                group['params'].append(parameter)
                group['param_names'].append(name)
        logger = MMLogger.get_current_instance()
        for (lr_mult, decay_mult), group in sorted(groups.items(), reverse=True):
            settings = dict(lr_scale=lr_mult)
            if self.base_lr is not None:
                settings['lr'] = self.base_lr * lr_mult
            if self.base_wd is not None:
                settings['weight_decay'] = self.base_wd * decay_mult
            params.append(dict(params=group['params'], **settings))
            logger.debug(f'learning rate x {lr_mult:.4g}, weight decay x {decay_mult:g}: {group["param_names"]}')
        logger.info(
            f'{len(seen)} parameters in {len(groups)} groups, learning rate x '
            f'{min(key[0] for key in groups):.4g} to {max(key[0] for key in groups):.4g}'
            if groups
            else 'no parameter is trained'
        )

    def _check_custom_keys(self, module: nn.Module) -> None:
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        for key in self.paramwise_cfg.get('custom_keys') or {}:
            if not any(_fits(key, name) for name in names):
                close = difflib.get_close_matches(key, {part for name in names for part in name.split('.')}, n=1)
                hint = f'did you mean {close[0]!r}?' if close else f'its names are like {names[0]!r} and {names[-1]!r}'
                raise ValueError(f'custom_keys: {key!r} fits no parameter of {type(module).__name__}; {hint}')

    def _declarations(self, module: nn.Module) -> tuple[dict[str, Callable], set[str]]:
        """Prefix -> get_layer_depth of the modules that have one, and the full names that get no weight decay."""
        depth_of, undecayed = {}, set()
        kept = NO_DECAY[self.paramwise_cfg.get('no_decay', 'declared')]
        for prefix, child in module.named_modules():
            start = f'{prefix}.' if prefix else ''
            # A host's whole model may have the method too, only to hand it on to its backbone.
            if hasattr(child, 'get_layer_depth') and not hasattr(child, 'backbone'):
                depth_of[start] = child.get_layer_depth
            if hasattr(child, 'no_weight_decay'):
                names = child.no_weight_decay()
                undecayed |= {start + name for name in names if kept is None or name.rpartition('.')[2] in kept}
        return depth_of, undecayed

    def _factors(self, name, leaf, parameter, owner, depth_of, undecayed) -> tuple[float, float]:
        cfg = self.paramwise_cfg
        lr_mult = 1.0
        for prefix, get_layer_depth in depth_of.items():
            if name.startswith(prefix):
                depth, num_depths = get_layer_depth(name, prefix)
                if cfg.get('decay_scope', 'all') == 'all' or depth == 0:
                    lr_mult = cfg['decay_rate'] ** (num_depths - 1 - depth)
        custom_keys = cfg.get('custom_keys') or {}
        fitting = [key for key in custom_keys if _fits(key, name)]
        custom = custom_keys[max(fitting, key=len)] if fitting else {}
        lr_mult *= custom.get('lr_mult', 1.0)
        if 'decay_mult' in custom:
            return lr_mult, custom['decay_mult']
        if name in undecayed:
            return lr_mult, 0.0
        if isinstance(owner, NORMS):
            return lr_mult, cfg.get('norm_decay_mult', 0.0)
        if leaf == 'bias':
            return lr_mult, cfg.get('bias_decay_mult', 0.0)
        if parameter.ndim <= 1:
            return lr_mult, cfg.get('flat_decay_mult', 0.0)
        return lr_mult, 1.0


def _fits(key: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, key) if set(key) & set('*?[') else key in name
