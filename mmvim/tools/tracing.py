"""What the blocks of a backbone compute for one image, and the decay of the state in their scans."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim.errors import ConfigError
from mmvim.models.backbones import HierVim, MambaVision, VisionMamba, VisionTransformer
from mmvim.models.backbones.mambavision.mixer import CONVS, MambaVisionMixer
from mmvim.models.layers import VimMixer
from mmvim.models.layers.class_tokens import class_token_positions
from mmvim.models.layers.windows import from_windows, window_shape
from ssm_kernels import causal_conv1d

# C channels, h x w map, S scans of a block (one a window), L tokens of a scan, D width, E inner width, N state size


@dataclass
class Block:
    """One block of a backbone and what it did with one image.

    Attributes:
        name: the module's name in the backbone.
        features: map behind the block (C, h, w), with the graph to the image if there was one.
        token_index: for every position of the map (h, w), where its token stands: scan * L + index in the scan.
        stride: distance of neighbouring positions, pixels.
        offset: where the first position's square of this side begins, pixels.
        mixer: the scanning mixer; None if the block has none.
        tokens: what the mixer took in (S, L, D).
        reverse: whether a mixer of one direction ran from the last token to the first.
    """

    name: str
    features: Tensor
    token_index: Tensor
    stride: int
    offset: float = 0.0
    mixer: VimMixer | MambaVisionMixer | None = None
    tokens: Tensor | None = None
    reverse: bool = False


@dataclass
class Direction:
    """One direction of a block's scan.

    Attributes:
        name: 'forward' or 'backward'.
        delta: steps (S, L, E), positive.
        A: decay rates (E, N), negative; over a step the state is multiplied by exp(delta A).
    """

    name: str
    delta: Tensor
    A: Tensor

    @property
    def backward(self) -> bool:
        """Whether it runs from the last token to the first."""
        return self.name == 'backward'

    def kept(self) -> Tensor:
        """Share of the state that outlives each token's step (S, L): exp(delta A), mean over channels and states."""
        return _mean_over_states(self.A, self.delta)

    def reach(self, scan: int, token: int) -> Tensor:
        """What is left of every token's contribution in the state at one token (L), mean over channels and states.

        A token j that the scan has passed has been multiplied by exp(A * sum of the steps behind j); tokens still
        to come are nan.

        Args:
            scan: which of the S scans.
            token: index of the token at which the state is looked at.
        """
        delta = self.delta[scan].double()
        if self.backward:
            delta, token = delta.flip(0), len(delta) - 1 - token
        passed = delta[: token + 1].cumsum(0)
        left = _mean_over_states(self.A.double(), passed[-1] - passed)
        left = torch.cat((left, left.new_full((len(delta) - token - 1,), torch.nan)))
        return left.flip(0) if self.backward else left


def _mean_over_states(A: Tensor, time: Tensor) -> Tensor:
    """Mean of exp(time A) over channels and states: A (E, N), time (..., E) -> (...)."""
    return sum((time * a).exp().mean(-1) for a in A.T) / A.shape[1]


def scan_directions(block: Block) -> list[Direction]:
    """The directions of a block's scan, with the steps that its mixer takes for the traced image.

    Raises:
        ConfigError: if the block has no scan.
    """
    mixer, tokens = block.mixer, block.tokens
    if mixer is None:
        raise ConfigError(f'block {block.name} has no scan: it is convolutional or attention')
    with torch.no_grad():
        x = mixer.in_proj(tokens.detach()).chunk(2, dim=-1)[0]
        if isinstance(mixer, MambaVisionMixer):
            u = CONVS[mixer.conv](x, mixer.conv1d_x.weight.squeeze(1), backend=mixer.scan_backend)
            # In the published models the projection adds its bias and the scan adds it again.
            return [_direction(mixer, '', 'forward', u, mixer.A_log, 2)]
        if mixer.directions == 'none':
            u = _convolve(mixer, '', x, block.reverse)
            return [_direction(mixer, '', 'backward' if block.reverse else 'forward', u, mixer.A_log)]
        forward = _convolve(mixer, '', x, False)
        directions = [_direction(mixer, '', 'forward', forward, mixer.A_log)]
        if mixer.directions == 'v1':
            return [*directions, _direction(mixer, '', 'backward', forward, mixer.A_b_log)]
        return [*directions, _direction(mixer, '_b', 'backward', _convolve(mixer, '_b', x, True), mixer.A_b_log)]


def _convolve(mixer: VimMixer, suffix: str, x: Tensor, reverse: bool) -> Tensor:
    conv = getattr(mixer, f'conv1d{suffix}')
    return causal_conv1d(x, conv.weight.squeeze(1), conv.bias, reverse=reverse, backend=mixer.scan_backend)


def _direction(mixer: nn.Module, suffix: str, name: str, u: Tensor, A_log: Tensor, biases: int = 1) -> Direction:
    x_proj, dt_proj = getattr(mixer, f'x_proj{suffix}'), getattr(mixer, f'dt_proj{suffix}')
    dt = x_proj(u)[..., : mixer.dt_rank]
    delta = F.softplus(F.linear(dt, dt_proj.weight).float() + biases * dt_proj.bias.float())
    return Direction(name, delta, -A_log.float().exp())


# ---- the blocks of each backbone


@dataclass
class _Recorder:
    """Hooks that keep what a block and its mixer did."""

    name: str
    module: nn.Module
    output: Any = None
    tokens: Tensor | None = None
    reverse: bool = False
    size: tuple[int, int] | None = None
    handles: list = field(default_factory=list)

    def attach(self) -> None:
        def keep_output(module, args, output):
            self.output = output

        def keep_input(module, args, kwargs):
            self.tokens = args[0]
            self.reverse = bool(kwargs.get('reverse', args[1] if len(args) > 1 else False))

        self.handles = [self.module.register_forward_hook(keep_output)]
        if self.mixer is not None:
            self.handles.append(self.mixer.register_forward_pre_hook(keep_input, with_kwargs=True))

    @property
    def mixer(self) -> nn.Module | None:
        mixer = getattr(self.module, 'mixer', None)
        return mixer if isinstance(mixer, VimMixer | MambaVisionMixer) else None

    def block(self, features: Tensor, token_index: Tensor, stride: int, offset: float = 0.0) -> Block:
        return Block(self.name, features, token_index, stride, offset, self.mixer, self.tokens, self.reverse)


def trace(backbone: nn.Module, image: Tensor) -> list[Block]:
    """Run one image through a backbone and keep what every block did.

    Blocks are counted from 0 through all stages, as in ``get_layer_depth``.

    Args:
        backbone: a VisionMamba, HierVim, MambaVision or VisionTransformer, in evaluation mode.
        image: normalised image (1, channels, H, W); the features have a graph to it if it requires a gradient.

    Raises:
        ConfigError: if the backbone is another.
    """
    tracer = next((function for kind, function in TRACERS.items() if isinstance(backbone, kind)), None)
    if tracer is None:
        known = ', '.join(f'mmvim.{kind.__name__}' for kind in TRACERS)
        raise ConfigError(f'the backbone of this config is {type(backbone).__name__}; this tool knows {known}')
    return tracer(backbone, image)


def _run(backbone: nn.Module, image: Tensor, modules: dict[str, nn.Module]) -> list[_Recorder]:
    recorders = [_Recorder(name, module) for name, module in modules.items()]
    for recorder in recorders:
        recorder.attach()
    try:
        backbone(image)
    finally:
        for handle in (handle for recorder in recorders for handle in recorder.handles):
            handle.remove()
    return recorders


def _blocks_of(name: str, stages: nn.ModuleList) -> dict[str, nn.Module]:
    return {f'{name}.{i}.blocks.{j}': b for i, stage in enumerate(stages) for j, b in enumerate(stage.blocks)}


def _token_index(h: int, w: int, skipped: tuple[int, ...] = ()) -> Tensor:
    tokens = [i for i in range(h * w + len(skipped)) if i not in skipped]
    return torch.tensor(tokens).reshape(h, w)


def _lay_out(tokens: Tensor, token_index: Tensor) -> Tensor:
    """Tokens (S, L, C) -> map (C, h, w)."""
    return tokens.flatten(0, 1)[token_index.flatten().to(tokens.device)].unflatten(0, token_index.shape).movedim(-1, 0)


def _trace_vim(backbone: VisionMamba, image: Tensor) -> list[Block]:
    recorders = _run(backbone, image, {f'layers.{i}': layer for i, layer in enumerate(backbone.layers)})
    h, w = backbone.patch_embed.grid_size(*image.shape[-2:])
    token_index = _token_index(h, w, class_token_positions(backbone.cls_layout, h * w))
    streams = [sum(recorder.output) for recorder in recorders]
    if backbone.directions == 'block':  # the second of a pair ends it, and the pair's outputs are added
        streams[1::2] = [first + second for first, second in zip(streams[::2], streams[1::2], strict=True)]
    stride = backbone.patch_embed.patch_stride
    offset = (backbone.patch_embed.patch_size - stride) / 2
    return [
        recorder.block(_lay_out(stream, token_index), token_index, stride, offset)
        for recorder, stream in zip(recorders, streams, strict=True)
    ]


def _trace_hier_vim(backbone: HierVim, image: Tensor) -> list[Block]:
    modules = _blocks_of('stages', backbone.stages)
    blocks = []
    for recorder in _run(backbone, image, modules):
        stride = backbone.patch_size * 2 ** int(recorder.name.split('.')[1])
        token_index = _token_index(*(-(-side // stride) for side in image.shape[-2:]))
        blocks.append(recorder.block(_lay_out(recorder.output, token_index), token_index, stride))
    return blocks


def _trace_mambavision(backbone: MambaVision, image: Tensor) -> list[Block]:
    modules = _blocks_of('levels', backbone.levels)
    blocks = []
    for recorder in _run(backbone, image, modules):
        index = int(recorder.name.split('.')[1])
        level, stride = backbone.levels[index], 4 * 2**index
        if level.window is None:
            h, w = recorder.output.shape[-2:]
            blocks.append(recorder.block(recorder.output[0], _token_index(h, w), stride))
            continue
        size = tuple(-(-side // stride) for side in image.shape[-2:])
        window = window_shape(size, level.window, level.fit_windows)
        tokens = recorder.output  # of the windows of one image
        token_index = torch.arange(tokens[..., 0].numel()).reshape(*tokens.shape[:2], 1)
        token_index = from_windows(token_index, window, 1, size)[0, 0]
        blocks.append(recorder.block(_lay_out(tokens, token_index), token_index, stride))
    return blocks


def _trace_transformer(backbone: VisionTransformer, image: Tensor) -> list[Block]:
    h, w = backbone.patch_embed.grid_size(*image.shape[-2:])
    token_index = _token_index(h, w, (0,) if backbone.with_cls_token else ())
    recorders = _run(backbone, image, {f'blocks.{i}': block for i, block in enumerate(backbone.blocks)})
    return [r.block(_lay_out(r.output, token_index), token_index, backbone.patch_embed.patch_stride) for r in recorders]


TRACERS: dict[type, Callable[..., list[Block]]] = {
    VisionMamba: _trace_vim,
    HierVim: _trace_hier_vim,
    MambaVision: _trace_mambavision,
    VisionTransformer: _trace_transformer,
}


def receptive_field(block: Block, image: Tensor, row: int, column: int) -> Tensor:
    """Effective receptive field of one position (H, W): |d sum of its channels / d pixel|, summed over colours.

    Source: arXiv 1701.04128.

    Args:
        block: a traced block.
        image: the image that was traced, requiring a gradient.
        row: of the position in the block's map.
        column: of the position.
    """
    (gradient,) = torch.autograd.grad(block.features[:, row, column].sum(), image, retain_graph=True)
    return gradient[0].abs().sum(0)
