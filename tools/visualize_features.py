"""Draw feature maps, the effective receptive field and the decay of the scans of a backbone for one image.

python tools/visualize_features.py IMAGE configs/demo/cascade_mask_rcnn_vim_ti_shapes.py CHECKPOINT --block 0 3
"""

import argparse
import os


def hide_gpus() -> None:
    """Obey --device cpu before mmengine looks for a GPU, which it does when it is imported."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--device')
    if parser.parse_known_args()[0].device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = '-1'


def main() -> None:
    hide_gpus()
    from mmvim import cli
    from mmvim.analysis import visualize

    cli.run(visualize.visualize, visualize.parser().parse_args())


if __name__ == '__main__':
    main()
