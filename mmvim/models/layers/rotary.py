"""Two-dimensional rotary position embedding of Vim."""

import torch
from torch import Tensor, nn

# B batch, L tokens, D width, h x w grid of patches


class RotaryEmbedding2d(nn.Module):
    """Turn neighbouring channel pairs by angles that grow with the row (first half) and the column (second half).

    Positions along an axis of n patches are ``arange(n) / n * pretrain_size``, so that a larger grid spans the
    range of angles seen in pre-training (RoFormer, arXiv 2104.09864, in the two-dimensional form of EVA-02,
    arXiv 2303.11331, that Vim uses).

    Args:
        embed_dims: width D of a token, a multiple of 4.
        pretrain_size: side of the pre-training grid, patches; 14 for the published checkpoints.
        theta: base of the geometric series of frequencies.

    Raises:
        ValueError: if embed_dims is no multiple of 4.
    """

    def __init__(self, embed_dims: int, pretrain_size: float = 14, theta: float = 10000.0) -> None:
        super().__init__()
        if embed_dims % 4:
            raise ValueError(f'embed_dims must be a multiple of 4 for rotary embedding, got {embed_dims}')
        self.embed_dims = embed_dims
        self.pretrain_size = pretrain_size
        self.theta = theta

    def tables(self, grid: tuple[int, int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Cosine and sine (h*w, D/2), float32, of the angle of each pair of channels at each patch."""
        half = self.embed_dims // 2
        frequency = self.theta ** (-torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
        rows, columns = (torch.arange(n, device=device, dtype=torch.float32) / n * self.pretrain_size for n in grid)
        shape = (*grid, half // 2)
        angle_rows = (rows[:, None] * frequency)[:, None].expand(shape)
        angle_columns = (columns[:, None] * frequency)[None].expand(shape)
        angle = torch.cat((angle_rows, angle_columns), dim=-1).flatten(0, 1)
        return angle.cos(), angle.sin()

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn tokens (B, L, D) by tables (L, D/2); the result has the dtype of x."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
