"""mmengine reads checkpoint files without running code from them, and loses no weights in silence.

Every host loads files through mmengine, which looks these functions up at each call: `load_checkpoint`, the runners,
`init_cfg`, and the hosts' `get_model` and `init_detector`.
"""

from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType

from mmvim.compat.import_hook import replace_everywhere, when_imported
from mmvim.errors import CheckpointError

MODULE = 'mmengine.runner.checkpoint'


def read_checkpoints_safely() -> None:
    """Put the functions below in place, whether mmengine's runner is imported already or only later."""
    when_imported(MODULE, _replace)


def _replace(host: ModuleType) -> None:
    # here and not above, so that `import mmvim` stays light: mmengine's runner has loaded by now all that these need
    from mmvim.weights.classifier import fit_to_classifier
    from mmvim.weights.reading import SOURCE, facts_of_file, part_of, read_from_http, read_from_local, read_object

    original = host.load_state_dict

    def load_state_dict(module, state_dict: Mapping, strict: bool = False, logger=None) -> None:
        """mmengine's function, which takes the file of a published classifier for a classifier of MMPretrain too.

        Raises:
            CheckpointError: if the weights do not fit a backbone of this package.
        """
        if SOURCE in getattr(state_dict, '_metadata', {}).get('', {}):
            state_dict = fit_to_classifier(module, state_dict)
        original(module, state_dict, strict, logger)

    def load_checkpoint_with_prefix(prefix: str, filename: str, map_location=None) -> OrderedDict:
        """mmengine's function for `init_cfg=dict(type='Pretrained', prefix=...)`, which keeps the weights' metadata.

        Without the metadata a backbone would not know that its weights come from a file and must be complete, nor
        their grid of patches.

        Raises:
            CheckpointError: if no name in the file has the prefix.
        """
        checkpoint = host._load_checkpoint(filename, map_location=map_location)
        weights = checkpoint.get('state_dict', checkpoint)
        prefix = prefix.rstrip('.') + '.'
        found = part_of(weights, prefix)
        if not found:
            raise CheckpointError(
                f"checkpoint '{filename}' has no weights under '{prefix}', it holds {', '.join(list(weights)[:3])}, "
                '...: leave prefix out of init_cfg if they are the backbone alone or a published classifier'
            )
        found._metadata = getattr(found, '_metadata', OrderedDict())
        facts = facts_of_file(getattr(weights, '_metadata', {}).get('', {}))
        found._metadata[''] = {**found._metadata.get('', {}), **facts}
        return found

    replace_everywhere('load_state_dict', original, load_state_dict)
    host._load_checkpoint_with_prefix = load_checkpoint_with_prefix
    # what the loaders of all other schemes call: s3://, pavi://, torchvision://, openmmlab://, mmcls://
    host._safe_torch_load, host.load_from_http, host.load_from_local = read_object, read_from_http, read_from_local
    host.CheckpointLoader.register_scheme(prefixes='', loader=read_from_local, force=True)
    host.CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=read_from_http, force=True)
