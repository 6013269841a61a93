"""Draw feature maps, the effective receptive field and the decay of the scans of a backbone for one image.

python tools/visualize_features.py IMAGE configs/demo/cascade_mask_rcnn_vim_ti_shapes.py CHECKPOINT --block 0 3
"""

from _process import prepare


def main() -> None:
    prepare()
    from mmvim import cli
    from mmvim.analysis import visualize

    cli.run(visualize.visualize, visualize.parser().parse_args())


if __name__ == '__main__':
    main()
