# Classification by the mean over all tokens. The ablation of directions starts from it, for it has no class token.
_base_ = '../vim/vim-ti_8xb128_in1k.py'

model = dict(backbone=dict(cls_token=None, out_type='avg_featmap'))
