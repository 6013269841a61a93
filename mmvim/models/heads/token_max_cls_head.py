"""Classification heads; derived from MMPretrain's, hence imported only when a config names one."""

from mmpretrain.models.heads import LinearClsHead
from torch import Tensor

from mmvim.registry import MODELS


@MODELS.register_module()
class TokenMaxClsHead(LinearClsHead):
    """Classify every token and keep, per class, the largest score: Vim's "max pool" (arXiv 2401.09417, section 4.4).

    It takes all tokens of a backbone, such as those of ``mmvim.VisionMamba`` with ``out_type='raw'``. Arguments are
    those of MMPretrain's LinearClsHead.
    """

    def forward(self, feats: tuple[Tensor]) -> Tensor:
        """Tokens (B, L, D), the last of feats -> scores (B, classes).

        Raises:
            ValueError: if the features are no tokens, with their shape.
        """
        tokens = self.pre_logits(feats)
        if tokens.ndim != 3:
            raise ValueError(
                f"TokenMaxClsHead needs tokens (B, L, D), got {tuple(tokens.shape)}: set out_type='raw' in the backbone"
            )
        return self.fc(tokens).amax(dim=1)
