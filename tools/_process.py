"""What every tool does before anything else is imported."""

import argparse
import os
from importlib import import_module


def prepare() -> None:
    """Set the environment of this process and of those that it starts.

    - Obey ``--device cpu`` before mmengine looks for a GPU, which it does when it is imported.
    - On Linux, let PyTorch ask for pages of 2 MiB for large tensors on the CPU, unless the user has decided it: glibc
      returns every block above 32 MiB to the system when it is freed, and each new one faults in all of its pages.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--device')
    if parser.parse_known_args()[0].device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')


def start(name: str) -> None:
    """Run the tool of this name in `mmvim.tools` with the arguments of the command line."""
    prepare()
    import_module('mmvim.tools.command_line').run(import_module(f'mmvim.tools.{name}'))
