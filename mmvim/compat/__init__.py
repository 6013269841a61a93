"""What the host libraries lack: the look-up of packages for `_base_`, and mmcv's ops without compiled code."""

from mmvim.compat.lookup import keep_host_scope, register_packages
from mmvim.compat.mmcv_finder import serve_missing_ops
from mmvim.compat.mmcv_ops import MissingOpError
from mmvim.compat.versions import explain_transformers, require


def prepare_hosts() -> None:
    """Prepare mmengine and mmcv for mmvim. Called by `import mmvim`; calling it again does nothing."""
    register_packages()
    keep_host_scope()
    serve_missing_ops()


__all__ = ['MissingOpError', 'explain_transformers', 'prepare_hosts', 'require']
