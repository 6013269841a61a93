"""Draw feature maps, the effective receptive field and the decay of the scans of a backbone for one image.

python tools/visualize_features.py IMAGE configs/demo/cascade_mask_rcnn_vim_ti_shapes.py CHECKPOINT --block 0 3
"""

from _process import start


def main() -> None:
    """Run the tool."""
    start('visualize')


if __name__ == '__main__':
    main()
