"""Tell which model a checkpoint is of, how its weights fit, and which configs are for it.

python tools/verify_checkpoint.py FILE
"""

from _device import hide_gpus


def main() -> None:
    hide_gpus()
    from mmvim import cli
    from mmvim.analysis import verify

    cli.run(verify.verify, verify.parser().parse_args())


if __name__ == '__main__':
    main()
