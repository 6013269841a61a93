"""What several tools do before anything else is imported."""

import argparse
import os


def hide_gpus() -> None:
    """Obey --device cpu before mmengine looks for a GPU, which it does when it is imported."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--device')
    if parser.parse_known_args()[0].device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
