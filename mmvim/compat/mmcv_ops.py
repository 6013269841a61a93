"""mmcv's compiled ops, served by torch and torchvision, for an mmcv that was installed without them.

The module `mmcv._ext` is what mmcv's Python code calls. Here are the functions of it that detection, focal loss and
deformable attention need; they fill the tensors that mmcv passes for results. Arithmetic is in float32, or float64
where an input has it, whatever the dtypes are: torchvision takes neither bfloat16 on a CPU nor mixed dtypes.
Every other op of that module exists too and raises `MissingOpError` when it is called.
"""

# N boxes, K RoIs, C channels, (H, W) feature map, (h, w) pooled map

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

HOW_TO_COMPILE = (
    'compile the ops of mmcv, which needs a C++ compiler and, for GPUs, the CUDA toolkit of your torch: FORCE_CUDA=1 '
    'python -m pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall onedl-mmcv'
)


class MissingOpError(RuntimeError):
    """A compiled mmcv op was called that nothing serves here."""


def missing_op(name: str) -> Callable:
    """An op of this name that raises `MissingOpError` when it is called."""

    def op(*args, **kwargs):
        raise MissingOpError(
            f'mmcv has no compiled op {name!r} here and torchvision has no counterpart that mmvim could use instead. '
            f'Choose a model part that does without it, or {HOW_TO_COMPILE}'
        )

    op.__name__ = op.__qualname__ = name
    return op


def torchvision_ops() -> ModuleType:
    """The module `torchvision.ops`.

    Raises:
        ImportError: if torchvision is missing or does not fit torch, with the remedy.
    """
    try:
        import torchvision.ops
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f'mmcv was installed without compiled ops, and torchvision, which serves them instead, fails to load '
            f'({error}). Install a torch and a torchvision that belong together in one command: '
            'python -m pip install --upgrade torch torchvision'
        ) from error
    return torchvision.ops


def in_working_precision(*tensors: Tensor) -> list[Tensor]:
    """The tensors detached, in float64 if one of them is, else in float32."""
    working = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.detach().to(working) for tensor in tensors]


def get_compiler_version() -> str:
    """What mmcv reports as its compiler."""
    return 'n/a (no compiled ops)'


def get_compiling_cuda_version() -> str:
    """What mmcv reports as the CUDA version of its ops."""
    return 'n/a (no compiled ops)'


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices (int64) of the boxes (N, 4) that stay, best score first; a box's side is `x2 - x1 + offset`."""
    boxes, scores = in_working_precision(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision_ops().nms(boxes, scores, iou_threshold)


def overlaps(box: Tensor, boxes: Tensor, offset: int = 0) -> Tensor:
    """IoU of one box (4) with boxes (N, 4)."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset).clamp(min=0)
    intersection = sides.prod(dim=1)
    area = (box[2:] - box[:2] + offset).prod()
    return intersection / (area + (boxes[:, 2:] - boxes[:, :2] + offset).prod(dim=1) - intersection)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503). Fills the first rows of dets (N, 5) and returns the indices (int64) of those boxes.

    Args:
        boxes: boxes (N, 4).
        scores: scores (N).
        dets: receives boxes and their new scores.
        iou_threshold: overlap above which methods 0 and 1 act.
        sigma: width of the Gaussian.
        min_score: boxes below it are dropped.
        method: 0 drops overlapping boxes, 1 lowers their scores linearly, 2 with a Gaussian of width `sigma`.
        offset: added to the sides of a box.
    """
    boxes, scores = in_working_precision(boxes, scores)
    scores = scores.clone()
    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left):
        best = scores[left].argmax()
        index = left[best]
        dets[len(kept), :4] = boxes[index]
        dets[len(kept), 4] = scores[index]
        kept.append(index)
        left = torch.cat([left[:best], left[best + 1 :]])
        iou = overlaps(boxes[index], boxes[left], offset)
        if method == 2:
            weight = torch.exp(-(iou**2) / sigma)
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1.0)
        scores[left] *= weight
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of indices into dets (N, 5): each box that stays, followed by those that it suppresses."""
    boxes, scores = in_working_precision(dets[:, :4], dets[:, 4])
    left = scores.argsort(descending=True, stable=True)
    groups = []
    while len(left):
        index, left = left[0], left[1:]
        suppressed = overlaps(boxes[index], boxes[left]) >= iou_threshold
        groups.append([int(index), *left[suppressed].tolist()])
        left = left[~suppressed]
    return groups


def refuse_max_pooling(pool_mode: int) -> None:
    """Refuse RoIAlign with maximum pooling (0), which torchvision lacks.

    Raises:
        MissingOpError: with the remedy.
    """
    if pool_mode == 0:
        raise MissingOpError(
            "RoIAlign with pool_mode='max' needs mmcv's compiled op 'roi_align_forward'; torchvision averages only. "
            f"Set pool_mode='avg' in the RoI extractor's roi_layer, or {HOW_TO_COMPILE}"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (arXiv 1703.06870) of input (B, C, H, W) at rois (K, 5), written to output (K, C, h, w)."""
    refuse_max_pooling(pool_mode)
    features, boxes = in_working_precision(input, rois)
    size = (aligned_height, aligned_width)
    output.copy_(torchvision_ops().roi_align(features, boxes, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward` for its input: from grad_output (K, C, h, w) to grad_input (B, C, H, W)."""
    refuse_max_pooling(pool_mode)
    torchvision_ops()
    grad, boxes = in_working_precision(grad_output, rois)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad, boxes, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
        )
    )


def sigmoid_focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss (arXiv 1708.02002, eq. 5) of logits (N, C) for class indices (N); an index of C is background."""
    positive = torch.nn.functional.one_hot(target, input.shape[1] + 1)[:, :-1].to(input)
    loss = torchvision_ops().sigmoid_focal_loss(input, positive, alpha, gamma)
    if weight.numel():
        # a sample's row has the weight of its class; background has none of its own
        loss = loss * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    return loss


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of logits (N, C) for class indices (N) into output (N, C)."""
    logits, weight = in_working_precision(input, weight)
    output.copy_(sigmoid_focal_loss(logits, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the gradient of the summed focal loss into grad_input (N, C)."""
    logits, weight = in_working_precision(input, weight)
    with torch.enable_grad():
        logits.requires_grad_()
        loss = sigmoid_focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def deformable_attention(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """mmcv's PyTorch function of deformable attention; see `ms_deform_attn_forward`."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Deformable attention (arXiv 2010.04159, eq. 3) by mmcv's own PyTorch function, which mmcv uses on CPUs only."""
    tensors = in_working_precision(value, sampling_locations, attention_weights)
    return deformable_attention(tensors[0], value_spatial_shapes, *tensors[1:]).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of `ms_deform_attn_forward` for the output gradient grad_output."""
    *tensors, grad = in_working_precision(value, sampling_locations, attention_weights, grad_output)
    with torch.enable_grad():
        for tensor in tensors:
            tensor.requires_grad_()
        output = deformable_attention(tensors[0], value_spatial_shapes, *tensors[1:])
    gradients = torch.autograd.grad(output, tensors, grad)
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        target.copy_(gradient)


SERVED = (
    get_compiler_version,
    get_compiling_cuda_version,
    nms,
    nms_match,
    softnms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    ms_deform_attn_forward,
    ms_deform_attn_backward,
)
