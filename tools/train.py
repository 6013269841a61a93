"""Train a detector, segmentor or classifier.

python tools/train.py configs/demo/cascade_mask_rcnn_vim_ti_shapes.py
"""

from _process import start


def main() -> None:
    """Run the tool."""
    start('train')


if __name__ == '__main__':
    main()
