"""Counting the floating-point operations of a model.

As in mmengine, one multiply-add is one operation, and elementwise work does not count. The formulas are for
mmengine's FlopAnalyzer, which traces a pass with real tensors, and for `count`, which makes the pass with fake tensors:
these have shapes and no values, so that it takes neither time nor memory at any size.
"""

# B batch, L tokens, D channels, N state size, R rank of dt, W width, K directions

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from mmvim.errors import InputError, first_line

# Per channel, state and token: decay times state, input times step, and the read-out.
SCAN = 3
KINDS = dict(
    linear='linear layers',
    convolution='convolutions, including the depthwise ones before the scans',
    scan=f'selective scans, {SCAN} per channel, state and token',
    attention='both products of attention, fused or not',
    norm='normalisations, per value: LayerNorm 5, BatchNorm 2 as in mmengine; RMSNorm 3, 4 with its addition',
    resampling='interpolation and pooling',
)
PUBLISHED = ('linear', 'convolution')  # what papers mostly count

Shape = Sequence[int]


# ---- formulas: from the operator's arguments, shapes in place of tensors, to operations by kind


def attention(q: Shape, k: Shape, *_, **__) -> Counter[str]:
    """Both products of scaled_dot_product_attention: q (B, H, L, E), k and v (B, H, S, E)."""
    return Counter(attention=2 * prod(q) * k[-2])


def selective_scan(u: Shape, dt: Shape, A: Shape, *_, **__) -> Counter[str]:
    """Scan of u (K, B, L, D) and A (K, D, N): linear in the tokens."""
    return Counter(scan=SCAN * prod(u) * A[-1])


def causal_conv1d(x: Shape, weight: Shape, *_, **__) -> Counter[str]:
    """Convolution of x (B, L, D) and weight (K, D, W)."""
    return Counter(convolution=prod(x) * weight[0] * weight[2])


def mamba_inner(x: Shape, z: Shape | None, weights: Sequence[Shape], *_, **__) -> Counter[str]:
    """Convolution, x_proj, dt_proj and scan of every direction; x (B, L, D), seven weights for a direction."""
    found: Counter[str] = Counter()
    for first in range(0, len(weights), 7):
        conv, bias, x_proj, dt_proj, A = weights[first : first + 5]
        found.update(convolution=conv[1], linear=x_proj[0] + dt_proj[1], scan=SCAN * A[1])
    return Counter({kind: count * prod(x) for kind, count in found.items()})


def add_rms_norm(x: Shape, residual: Shape | None, *_, **__) -> Counter[str]:
    """Norm of x (..., D): squares added up, scaled, weighted, and the addition before it."""
    return Counter(norm=prod(x) * (3 if residual is None else 4))


OURS = {
    f'ssm_kernels::{op.__name__}_{backend}': op
    for op in (selective_scan, causal_conv1d, mamba_inner, add_rms_norm)
    for backend in ('numba', 'triton')
}


def _norm(per_value: int, weight: int) -> Callable[..., Counter[str]]:
    """Formula of a normalisation whose weights are the argument of this number."""
    return lambda x, *args, **_: Counter(norm=prod(x) * (per_value if args[weight - 1] is not None else per_value - 1))


def _products(kind: str, op: object) -> Callable[..., Counter[str]]:
    """PyTorch's own formula, which counts multiplications and additions."""
    return lambda *args, out, **kwargs: Counter({kind: flop_registry[op](*args, out_val=out, **kwargs) // 2})


aten = torch.ops.aten
FORMULAS = OURS | {
    'aten::mm': _products('linear', aten.mm),
    'aten::addmm': _products('linear', aten.addmm),
    'aten::bmm': _products('attention', aten.bmm),
    'aten::baddbmm': _products('attention', aten.baddbmm),
    'aten::convolution': _products('convolution', aten.convolution),
    'aten::upsample_nearest2d': lambda *_, out, **__: Counter(resampling=prod(out)),
    'aten::upsample_bilinear2d': lambda *_, out, **__: Counter(resampling=4 * prod(out)),
    'aten::_scaled_dot_product_flash_attention_for_cpu': attention,
    'aten::native_layer_norm': _norm(5, 2),
    'aten::native_group_norm': _norm(5, 1),
    'aten::native_batch_norm': _norm(2, 1),
    'aten::_native_batch_norm_legit_no_training': _norm(2, 1),
    'aten::_adaptive_avg_pool2d': lambda x, *_, **__: Counter(resampling=prod(x)),
}  # fmt: skip


# ---- mmengine's counter


def _handle(formula: Callable[..., Counter[str]]) -> Callable[[list, list], int]:
    return lambda inputs, outputs: sum(formula(*map(_traced_shape, inputs)).values())


def _traced_shape(value: Any) -> Any:
    if value.node().kind() == 'prim::ListConstruct':
        return [_traced_shape(entry) for entry in value.node().inputs()]
    return value.type().sizes() if value.isCompleteTensor() else None


HANDLES = {name: _handle(op) for name, op in OURS.items()} | {'aten::scaled_dot_product_attention': _handle(attention)}


def analyzer(model: nn.Module, *inputs: Tensor) -> FlopAnalyzer:
    """An analyzer of mmengine for model(*inputs) with these formulas.

    Args:
        model: in evaluation mode.
        inputs: on a device where a fast backend of ssm_kernels runs; plain PyTorch would be traced step by step.
    """
    found = FlopAnalyzer(model, inputs if len(inputs) > 1 else inputs[0])
    return found.set_op_handle(**HANDLES).unsupported_ops_warnings(False).uncalled_modules_warnings(False)


# ---- counting without computing


@dataclass
class Cost:
    """What one pass of a model costs.

    Attributes:
        shape: height and width of the image, pixels.
        params: parameters of every part.
        flops: operations of every part by kind, in the order of the model.
        tokens: of the largest scan or fused attention, the batch of its windows and its padding included; 0 if there
            is none, or attention is made of matrix products.
        rois: proposals and masks that the second stage of a detector was counted for, None without one.
        fake: whether nothing was computed.
    """

    shape: tuple[int, int]
    params: dict[str, int]
    flops: dict[str, Counter[str]] = field(default_factory=dict)
    tokens: int = 0
    rois: tuple[int, int] | None = None
    fake: bool = True

    @property
    def kinds(self) -> Counter[str]:
        """Operations of the whole model by kind."""
        return sum(self.flops.values(), Counter())

    @property
    def total(self) -> int:
        """Operations of the whole model."""
        return self.kinds.total()

    @property
    def published(self) -> int:
        """Operations of its linear layers and convolutions."""
        return sum(self.kinds[kind] for kind in PUBLISHED)


class _Counting(TorchDispatchMode):
    """Adds every operator's work to a cost, under the part of the model that is running."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost, self.parts = cost, ['other']

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name in FORMULAS:
            shapes, options, result = tree_map_only(Tensor, lambda x: tuple(x.shape), (args, kwargs, out))
            found = FORMULAS[name](*shapes, **options | dict(out=result))
            self.cost.flops.setdefault(self.parts[-1], Counter()).update(found)
            if FORMULAS[name] in (selective_scan, mamba_inner, attention):
                first = shapes[0]  # (K, B, L, D), (B, L, D), (B, H, L, E)
                tokens = first[0] * first[-2] if FORMULAS[name] is not selective_scan else first[1] * first[2]
                self.cost.tokens = max(self.cost.tokens, tokens)
        return out

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Notices which of the model's children every operator belongs to; the hosts call some by their forward."""

        def within(part: str, forward: Callable) -> Callable:
            @functools.wraps(forward)
            def call(*args, **kwargs):
                self.parts.append(part)
                try:
                    return forward(*args, **kwargs)
                finally:
                    self.parts.pop()

            return call

        modules = [(name.split('.')[0], module) for name, module in model.named_modules() if name]
        for part, module in modules:
            module.forward = within(part, module.forward)
        try:
            yield
        finally:
            for _, module in modules:
                del module.forward


def count(build: Callable[[], nn.Module], shapes: Sequence[tuple[int, int]]) -> list[Cost]:
    """What a pass of one image of each shape costs.

    Nothing is computed, unless the control flow of the model depends on values in the image.

    Args:
        build: makes the model, of MMDetection, MMSegmentation or MMPretrain, or any that takes an image alone.
        shapes: heights and widths, pixels.

    Raises:
        InputError: if the model cannot take such an image.
    """
    try:
        model = hollow(build)
        return [_count(model, shape, fake=True) for shape in shapes]
    except Exception:  # some models look at values, and some refuse the shape: a real pass decides
        model = build()
        print('this model has to be run on real values, which takes longer', file=sys.stderr)
    for parameter in model.parameters():
        parameter.detach().zero_()
    return [_real(model, shape) for shape in shapes]


def _real(model: nn.Module, shape: tuple[int, int]) -> Cost:
    try:
        return _count(model, shape, fake=False)
    except Exception as error:
        raise InputError(
            f'{type(model).__name__} cannot take an image of {"x".join(map(str, shape))} pixels: {first_line(error)}'
        ) from error


def hollow(build: Callable[[], nn.Module]) -> nn.Module:
    """The model without values for its parameters, as fast as it can be had."""
    try:
        with torch.device('meta'):
            model = build()
    except Exception:  # a constructor that looks at values
        model = build()
    with FakeTensorMode():
        return model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device='cpu'))


@contextmanager
def _separate_operators() -> Iterator[None]:
    """Within it PyTorch's transformer layers run operator by operator, not as one that has no formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _count(model: nn.Module, shape: tuple[int, int], fake: bool) -> Cost:
    params = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    params['other'] = sum(p.numel() for p in model.parameters()) - sum(params.values())
    cost = Cost(shape, {name: number for name, number in params.items() if number}, fake=fake)
    counting = _Counting(cost)
    model.eval()
    mode = next((p.fake_mode for p in model.parameters() if hasattr(p, 'fake_mode')), None)
    with (
        torch.no_grad(),
        _separate_operators(),
        mode or torch.random.fork_rng(devices=[]),
        counting,
        counting.watch(model),
    ):
        image = torch.empty(1, 3, *shape) if fake else torch.rand(1, 3, *shape)
        _forward(model, image, cost)
    names = [name for name, _ in model.named_children()] + ['other']
    cost.flops = {name: cost.flops.get(name, Counter()) for name in names if name in cost.flops or name in cost.params}
    return cost


def _forward(model: nn.Module, image: Tensor, cost: Cost) -> None:
    if _has_known_second_stage(model):
        maps = model.extract_feat(image)
        if model.with_rpn:
            model.rpn_head(maps)
        cost.rois = _second_stage(model, image)
    elif 'mode' not in inspect.signature(model.forward).parameters:
        model(image)
    elif 'mmdet' in sys.modules and isinstance(model, sys.modules['mmdet'].models.BaseDetector):
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        size = tuple(image.shape[-2:])
        sizes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
        sample = DetDataSample(metainfo=dict(sizes, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        model(image, [sample], mode='tensor')
    else:
        model(image, mode='tensor')


def _has_known_second_stage(model: nn.Module) -> bool:
    head = getattr(model, 'roi_head', None)
    return type(head).__name__ in ('StandardRoIHead', 'CascadeRoIHead', 'DynamicRoIHead')


def _second_stage(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Box heads for as many proposals as a test allows at most, mask heads for as many detections."""
    head: Any = model.roi_head
    test: Any = model.test_cfg
    rois = test['rpn']['max_per_img'] if test.get('rpn') else test['rcnn']['max_per_img']
    masks = test['rcnn']['max_per_img'] if head.with_mask else 0

    def each(part: nn.Module) -> list[nn.Module]:
        return list(part) if isinstance(part, nn.ModuleList) else [part]

    def features(extractor: Any, number: int) -> Tensor:
        out = image.new_empty(number, extractor.out_channels, *extractor.roi_layers[0].output_size)
        return head.shared_head(out) if head.with_shared_head else out

    for extractor, bbox_head in zip(each(head.bbox_roi_extractor), each(head.bbox_head), strict=True):
        bbox_head(features(extractor, rois))
    if head.with_mask:
        extractors = each(head.bbox_roi_extractor if head.share_roi_extractor else head.mask_roi_extractor)
        for extractor, mask_head in zip(extractors, each(head.mask_head), strict=False):
            mask_head(features(extractor, masks))
    return rois, masks
