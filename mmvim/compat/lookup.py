"""Let mmengine find the configs of mmvim and of the installed hosts, as in `_base_ = 'mmvim::vim/x.py'`."""

from functools import wraps
from importlib.util import find_spec

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import is_installed

from mmvim.registry import SCOPE

HOSTS = ('mmdet', 'mmseg', 'mmpretrain')


def register_packages() -> None:
    """Teach mmengine the `mmvim::` prefix, and every host's prefix under the name that it is really installed by.

    mmengine maps a module to the distribution name of upstream, `mmseg` to `mmsegmentation`; a fork has another. A name
    that is no distribution is looked up as a module, so the module's own name serves whatever the distribution is.
    """
    MODULE2PACKAGE[SCOPE] = SCOPE
    for module in HOSTS:
        package = MODULE2PACKAGE.get(module)
        if find_spec(module) is not None and (package is None or not is_installed(package)):
            MODULE2PACKAGE[module] = module


def keep_host_scope() -> None:
    """Resolve unscoped names of a config inherited through `mmvim::` in its host, not in mmvim.

    mmengine marks everything inherited from `package::` with that package as scope. A config of mmvim names its own
    parts with their scope and means its host's by all other names, so its `default_scope` is the scope to mark.

    What a package path stands for is kept: mmengine reads all metafiles of the package for it, half a second a time.
    """
    original = Config._get_cfg_path
    if getattr(original, 'keeps_host_scope', False):
        return

    known = {}

    @wraps(original)
    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path in known:
            return known[cfg_path]
        path, scope = original(cfg_path, filename)
        if scope == SCOPE:
            scope = Config.fromfile(path, import_custom_modules=False).get('default_scope')
        if '::' in cfg_path:
            known[cfg_path] = path, scope
        return path, scope

    vars(get_cfg_path)['keeps_host_scope'] = True
    Config._get_cfg_path = staticmethod(get_cfg_path)
