"""What tools/benchmark.py makes of its rows: ratios, plots and a summary."""

from pathlib import Path

from matplotlib.figure import Figure

CELL = dict(resolution=int, batch_size=int, fpn=bool)
# What rows must share to be compared.
SETTINGS = ('device', 'dtype', 'mode', 'threads', 'autocast', 'warmup', 'repeats')
RATIOS = ('baseline', 'speed_ratio', 'memory_ratio')
PLOTS = dict(speed=('images_per_second', 'images per second'), memory=('memory_mib', 'memory, MiB'))
FORMATS = ('png', 'svg')


def place(row: dict, *names: str) -> tuple:
    """What tells a row from others: its cell, its settings, and the named entries."""
    return tuple(row.get(name) for name in (*CELL, *SETTINGS, *names))


def add_ratios(rows: list[dict], baseline: str) -> list[dict]:
    """Rows with 'speed_ratio' and 'memory_ratio', the model's speed and memory over the baseline's in the same cell."""
    base = {place(row): row for row in rows if row['model'] == baseline}
    found = []
    for row in rows:
        row = {name: value for name, value in row.items() if name not in RATIOS} | dict(baseline=baseline)
        other = base.get(place(row), {})
        if row.get('latency_ms') and other.get('latency_ms'):
            row['speed_ratio'] = other['latency_ms'] / row['latency_ms']
        if _figure(row, 'memory_mib') and _figure(other, 'memory_mib'):
            row['memory_ratio'] = row['memory_mib'] / other['memory_mib']
        found.append(row)
    return found


def _figure(row: dict, name: str) -> float | None:
    """A figure of a row. Memory over that of a pass at a certain size counts at larger sizes only."""
    value = row.get(name)
    if not value or value < 0 or (name == 'memory_mib' and row['resolution'] <= row.get('memory_above_px', 0)):
        return None
    return value


def curves(rows: list[dict], value: str) -> dict[tuple[str, bool, int], list[tuple[int, float]]]:
    """Points (resolution, value) for each model, with or without pyramid, and batch size, by the resolution."""
    lines: dict[tuple[str, bool, int], list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row['resolution']):
        if _figure(row, value):
            lines.setdefault((row['model'], row['fpn'], row['batch_size']), []).append((row['resolution'], row[value]))
    return lines


def draw(rows: list[dict], folder: Path) -> None:
    """Two plots against the resolution, speed and memory, both on a logarithmic axis, as PNG and SVG."""
    models = list(dict.fromkeys(row['model'] for row in rows))
    several = len({row['batch_size'] for row in rows}) > 1
    for name, (value, title) in PLOTS.items():
        lines = curves(rows, value)
        if not lines:
            for suffix in FORMATS:  # of other settings
                (folder / f'{name}.{suffix}').unlink(missing_ok=True)
            continue
        figure = Figure(figsize=(7, 4.5), layout='constrained')
        axes = figure.add_subplot()
        for (model, fpn, batch), points in lines.items():
            style = dict(color=f'C{models.index(model)}', marker='o', linestyle='--' if fpn else '-')
            label = model + ' + FPN' * fpn + f', batch {batch}' * several
            axes.plot(*zip(*points, strict=True), **style, label=label)
        axes.set(yscale='log', xlabel='side of the image, pixels', ylabel=title)
        axes.set_xticks(sorted({row['resolution'] for row in rows}))
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize='small')
        first = rows[0]
        about = f'{first["device"]}, {first["threads"]} threads, {first["dtype"]}, {first["mode"]}'
        axes.set_title(about, fontsize='small')
        for suffix in FORMATS:
            figure.savefig(folder / f'{name}.{suffix}', dpi=120)


def summary(rows: list[dict]) -> str:
    """The rows for the terminal, one a line."""
    lines = []
    for row in rows:
        text = f'{row["resolution"]:5} px  batch {row["batch_size"]}  {row["model"]}{" + FPN" if row["fpn"] else ""}: '
        if row.get('latency_ms'):
            text += f'{row["latency_ms"]:.1f} ms ({row["fastest_ms"]:.1f} to {row["slowest_ms"]:.1f}), '
            text += f'{row["images_per_second"]:.2f} images/s'
        if _figure(row, 'memory_mib'):
            text += f', {row["memory_mib"]:.0f} MiB'
        if row.get('speed_ratio'):
            text += f', {row["speed_ratio"]:.2f} times the speed of {row["baseline"]}'
        lines.append(text + (row['error'] or ''))
    return '\n'.join(lines)
