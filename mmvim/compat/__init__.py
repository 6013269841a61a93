"""What the host libraries lack: the look-up of packages for `_base_`, and mmcv's ops without compiled code."""


def prepare_hosts() -> None:
    """Prepare mmengine and mmcv for mmvim. Called by `import mmvim`; calling it again does nothing."""


__all__ = ['prepare_hosts']
