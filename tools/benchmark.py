"""Speed and memory of backbones by resolution.

python tools/benchmark.py vim-tiny deit-tiny --attention both --baseline deit-tiny --out work_dirs/benchmark
"""


def main() -> None:
    from mmvim import cli
    from mmvim.analysis import benchmark

    cli.run(benchmark.main, benchmark.parser().parse_args())


if __name__ == '__main__':
    main()
