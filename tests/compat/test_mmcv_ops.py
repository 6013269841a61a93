"""mmcv's public functions, computing through torchvision, against definitions written out in NumPy."""

import sys

import numpy as np
import pytest
import torch
from mmcv.ops import RoIAlign, RoIPool, batched_nms, nms, nms_match, roi_align, soft_nms
from mmcv.ops.focal_loss import sigmoid_focal_loss
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

from mmvim.compat import MissingOpError
from mmvim.compat.mmcv_finder import TorchvisionOpsLoader

pytestmark = pytest.mark.skipif(
    not isinstance(sys.modules['mmcv._ext'].__spec__.loader, TorchvisionOpsLoader), reason='this mmcv has compiled ops'
)


def sample(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Bilinear value of image (C, H, W), zero further than one pixel outside."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(len(image))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[:, top, left] * (1 - x + left) + image[:, top, right] * (x - left)
    lower = image[:, bottom, left] * (1 - x + left) + image[:, bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)


def roi_align_by_definition(images, rois, size, scale, ratio, aligned):
    pooled = np.zeros((len(rois), images.shape[1], *size))
    for k, (image, *box) in enumerate(rois):
        x1, y1, x2, y2 = np.array(box) * scale - (0.5 if aligned else 0)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bin_h, bin_w = height / size[0], width / size[1]
        rows, columns = (ratio, ratio) if ratio > 0 else (int(np.ceil(bin_h)), int(np.ceil(bin_w)))
        for i in range(size[0]):
            for j in range(size[1]):
                values = [
                    sample(
                        images[int(image)], y1 + (i + (r + 0.5) / rows) * bin_h, x1 + (j + (c + 0.5) / columns) * bin_w
                    )
                    for r in range(rows)
                    for c in range(columns)
                ]
                pooled[k, :, i, j] = sum(values) / max(len(values), 1)
    return pooled


ROIS = torch.tensor(
    [
        [0, 3.0, 2.5, 30.0, 17.0],
        [1, 0.0, 0.0, 52.0, 36.0],  # the whole image
        [1, 40.0, 25.0, 70.0, 60.0],  # partly outside
        [0, 90.0, 90.0, 95.0, 99.0],  # wholly outside
        [0, 11.0, 12.0, 11.5, 12.25],  # less than a pixel
        [1, -20.0, -9.0, 7.0, 5.0],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 1, 3])
@pytest.mark.parametrize(('size', 'scale'), [((7, 7), 0.25), ((2, 5), 1.0), ((1, 1), 0.5)])
def test_roi_align_equals_its_definition(aligned, ratio, size, scale):
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 9, 13)))
    rois = ROIS.clone()
    rois[:, 1:] *= 0.25 / scale
    found = roi_align(images, rois, size, scale, ratio, 'avg', aligned)
    expected = roi_align_by_definition(images.numpy(), rois.numpy(), size, scale, ratio, aligned)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_gradient(aligned, ratio):
    images = torch.randn(
        2, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    rois = ROIS.clone()
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, (2, 3), 0.125, ratio, 'avg', aligned), images)


def test_roi_align_of_non_contiguous_gradient():
    images = torch.randn(1, 2, 5, 6, requires_grad=True)
    out = roi_align(images, torch.tensor([[0, 0, 0, 5.0, 4.0]]), (2, 3), 1.0, 2, 'avg', True)
    grad = torch.randn(1, 2, 3, 2).transpose(2, 3)
    (transposed,) = torch.autograd.grad(out, images, grad, retain_graph=True)
    (plain,) = torch.autograd.grad(out, images, grad.contiguous())
    assert torch.equal(transposed, plain)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rois_dtype', [torch.float32, None], ids=['float32 boxes', 'boxes of the same dtype'])
def test_roi_align_in_low_and_mixed_precision(dtype, rois_dtype):
    images = torch.randn(2, 3, 9, 13).to(dtype).requires_grad_()
    rois = ROIS.to(rois_dtype or dtype)
    out = roi_align(images, rois, (3, 3), 0.25, 0, 'avg', True)
    out.float().sum().backward()
    exact_images = images.detach().float().requires_grad_()
    exact = roi_align(exact_images, rois.float(), (3, 3), 0.25, 0, 'avg', True)
    exact.sum().backward()
    assert out.dtype == images.grad.dtype == dtype
    assert torch.equal(out, exact.to(dtype))
    assert torch.equal(images.grad, exact_images.grad.to(dtype))


def test_roi_align_without_boxes_keeps_the_graph():
    images = torch.randn(1, 2, 5, 6, requires_grad=True)
    out = roi_align(images, torch.zeros(0, 5), (2, 2), 1.0, 0, 'avg', True)
    out.sum().backward()
    assert out.shape == (0, 2, 2, 2)
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_max_pooling_says_what_it_needs():
    layer = RoIAlign(2, pool_mode='max')
    with pytest.raises(MissingOpError, match="pool_mode='avg'.*no-build-isolation"):
        layer(torch.randn(1, 1, 4, 4), torch.tensor([[0, 0, 0, 3.0, 3.0]]))


def iou(a, b, offset=0):
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    both = max(width, 0) * max(height, 0)
    return both / (sum((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)) - both)


def nms_by_definition(boxes, scores, threshold, offset=0):
    kept = []
    for i in np.argsort(-scores):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(int(i))
    return kept


def random_boxes(n, seed=0, side=30):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, side, (n, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.5, side / 2, (n, 2))], axis=1)
    return torch.from_numpy(boxes).float(), torch.from_numpy(rng.permutation(n) / n).float()


@pytest.mark.parametrize('n', [0, 1, 2, 97])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.0, 0.3, 0.7])
def test_nms_equals_its_definition(n, offset, threshold):
    boxes, scores = random_boxes(n)
    dets, kept = nms(boxes, scores, threshold, offset=offset)
    expected = nms_by_definition(boxes.double().numpy(), scores.numpy(), threshold, offset)
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[expected])


def test_nms_filters_by_score_and_number():
    boxes, scores = random_boxes(60)
    _, kept = nms(boxes, scores, 0.4, score_threshold=0.35, max_num=5)
    above = np.flatnonzero(scores.numpy() > 0.35)
    expected = above[nms_by_definition(boxes.double().numpy()[above], scores.numpy()[above], 0.4)][:5]
    assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_nms_takes_mixed_dtypes(dtype):
    boxes, scores = random_boxes(40)
    _, kept = nms(boxes.to(dtype), scores, 0.4)
    assert kept.tolist() == nms_by_definition(boxes.to(dtype).double().numpy(), scores.numpy(), 0.4)


@pytest.mark.parametrize('class_agnostic', [False, True])
@pytest.mark.parametrize('split_thr', [10_000, 10], ids=['in one', 'class by class'])
def test_batched_nms(class_agnostic, split_thr):
    boxes, scores = random_boxes(80)
    labels = torch.arange(80) % 3
    if class_agnostic and split_thr == 10:
        pytest.skip('mmcv itself splits by class there')
    config = dict(type='nms', iou_threshold=0.3, max_num=20, split_thr=split_thr, class_agnostic=class_agnostic)
    dets, kept = batched_nms(boxes, scores, labels, config)
    groups = [np.arange(80)] if class_agnostic else [np.flatnonzero(labels.numpy() == c) for c in range(3)]
    expected = np.concatenate(
        [group[nms_by_definition(boxes.double().numpy()[group], scores.numpy()[group], 0.3)] for group in groups]
    )
    expected = expected[np.argsort(-scores.numpy()[expected])][:20]
    assert kept.tolist() == expected.tolist()
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[kept])


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms_equals_its_definition(method, offset):
    boxes, scores = random_boxes(50)
    dets, kept = soft_nms(boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset)

    left = {i: float(score) for i, score in enumerate(scores)}
    expected = []
    while left:
        best = max(left, key=left.get)
        expected.append((best, left.pop(best)))
        for i in tuple(left):
            overlap = iou(boxes[best].tolist(), boxes[i].tolist(), offset)
            if method == 'gaussian':
                left[i] *= np.exp(-(overlap**2) / 0.5)
            elif overlap >= 0.3:
                left[i] *= 1 - overlap if method == 'linear' else 0
            if left[i] < 0.05:
                del left[i]
    assert kept.tolist() == [i for i, _ in expected]
    assert torch.equal(dets[:, :4], boxes[kept])
    np.testing.assert_allclose(dets[:, 4].numpy(), [score for _, score in expected], rtol=1e-5)


def test_soft_nms_leaves_its_input_alone():
    boxes, scores = random_boxes(50)
    before = scores.clone()
    soft_nms(boxes, scores)
    assert torch.equal(scores, before)


def test_soft_nms_without_boxes():
    dets, kept = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5)
    assert kept.shape == (0,) and kept.dtype == torch.int64


def test_nms_match_groups_every_box_once():
    boxes, scores = random_boxes(50)
    groups = [group.tolist() for group in nms_match(torch.cat([boxes, scores[:, None]], dim=1), 0.3)]
    assert sorted(index for group in groups for index in group) == list(range(50))
    assert [group[0] for group in groups] == nms_by_definition(boxes.double().numpy(), scores.numpy(), 0.3)
    assert len(groups) < 50
    for kept, *suppressed in groups:
        assert all(iou(boxes[kept].tolist(), boxes[i].tolist()) >= 0.3 for i in suppressed)


@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_focal_loss_equals_its_definition(weighted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.tensor([0, 3, 4, 1, 2, 4, 0])  # 4 is background
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64) if weighted else None
    found = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, 'none')

    p = 1 / (1 + np.exp(-logits.detach().numpy()))
    positive = target.numpy()[:, None] == np.arange(4)
    expected = np.where(positive, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    if weighted:
        expected *= np.array([0.5, 1.0, 2.0, 3.0, 1.0])[target.numpy()][:, None]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, target, 2.0, 0.25, weight, 'sum'), logits)


def test_deformable_attention_gradients_equal_autograd():
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[4, 5], [2, 3]])
    start = torch.tensor([0, 20])
    tensors = [
        torch.rand(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in [(2, 26, 2, 3), (2, 7, 2, 2, 4, 2), (2, 7, 2, 2, 4)]
    ]
    served = MultiScaleDeformableAttnFunction.apply(tensors[0], shapes, start, tensors[1], tensors[2], 64)
    plain = multi_scale_deformable_attn_pytorch(tensors[0], shapes, tensors[1], tensors[2])
    torch.testing.assert_close(served, plain, rtol=0, atol=0)
    upstream = torch.randn(served.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(served, tensors, upstream), torch.autograd.grad(plain, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_other_ops_say_what_they_need_when_called():
    layer = RoIPool(2)
    with pytest.raises(MissingOpError, match="'roi_pool_forward'.*C\\+\\+ compiler.*pip install"):
        layer(torch.randn(1, 1, 4, 4), torch.tensor([[0, 0, 0, 3.0, 3.0]]))


def test_a_broken_torchvision_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision.ops', None)
    with pytest.raises(ImportError, match='pip install --upgrade torch torchvision'):
        nms(*random_boxes(3), 0.5)
