"""Speed and memory of backbones by resolution.

python tools/benchmark.py vim-tiny deit-tiny --attention both --baseline deit-tiny --out work_dirs/benchmark
"""

from _process import prepare


def main() -> None:
    prepare()
    from mmvim import cli
    from mmvim.analysis import benchmark

    cli.run(benchmark.main, benchmark.parser().parse_args())


if __name__ == '__main__':
    main()
