"""The layers of transformers that several backbones have: self-attention and the MLP behind it."""

import torch.nn.functional as F
from torch import Tensor, nn

# B batch, L tokens, D width

ATTENTIONS = ('sdpa', 'materialized')


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Args:
        embed_dims: width D.
        num_heads: heads; they divide D.
        attention: 'sdpa' calls scaled_dot_product_attention; 'materialized' computes the L x L weights of every head,
            as the baseline of the Vim paper does, for comparisons of memory and time.
    """

    def __init__(self, embed_dims: int, num_heads: int, attention: str = 'sdpa') -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise both projections."""
        init_linear(self.qkv)
        init_linear(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> tokens (B, L, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.attention == 'sdpa':
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between them.

    Args:
        embed_dims: width D.
        hidden: width between the layers.
    """

    def __init__(self, embed_dims: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, embed_dims)

    def init_weights(self) -> None:
        """Initialise both layers."""
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.act(self.fc1(x)))


def init_linear(linear: nn.Linear) -> None:
    """Weights from the truncated normal of standard deviation 0.02, zero bias."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
