"""Tell which model a checkpoint is of, how its weights fit, and which configs are for it.

python tools/verify_checkpoint.py FILE
"""

from _process import prepare


def main() -> None:
    prepare()
    from mmvim import cli
    from mmvim.analysis import verify

    cli.run(verify.verify, verify.parser().parse_args())


if __name__ == '__main__':
    main()
