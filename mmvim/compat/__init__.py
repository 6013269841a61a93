"""Everything that mmvim changes in mmengine, mmcv and the hosts, put in place by `install`."""

from mmvim.compat.arrays import take_any_array
from mmvim.compat.checkpoint_files import read_checkpoints_safely
from mmvim.compat.checkpoint_saving import save_checkpoints_safely
from mmvim.compat.label_maps import read_label_maps_as_they_are
from mmvim.compat.lookup import keep_host_scope, register_packages
from mmvim.compat.mixing import mix_any_images
from mmvim.compat.mmcv_finder import serve_missing_ops
from mmvim.compat.mmcv_ops import MissingOpError
from mmvim.compat.output_names import keep_outputs_apart
from mmvim.compat.stored_configs import keep_stored_configs_from_running
from mmvim.compat.versions import explain_transformers, require


def install() -> None:
    """Change the hosts, once for the process and whether they are imported before or after. `import mmvim` calls it.

    No other code of this package changes a host, and none of the changes depends on which models are built.

    - `register_packages`: `_base_ = 'mmvim::...'`, and `'mmseg::...'` of a fork under another distribution name.
      Needless when mmengine finds packages by their module.
    - `keep_host_scope`: unscoped names in a config inherited through `mmvim::` are its host's. Needless when mmengine
      marks such a config with its own `default_scope`.
    - `serve_missing_ops`: ops of an mmcv without compiled code come from torchvision. Needless where mmcv has them.
    - `read_checkpoints_safely`: files of weights, of every model, are read without running code from them; mmengine
      0.10.12 falls back to unpickling, which does. A file that holds objects of classes not known to be harmless is
      refused, with the remedy. safetensors are read too, `init_cfg` with a prefix keeps the metadata of weights, and a
      published classifier fits MMPretrain's names. Weights of models without a backbone of mmvim load as without it.
      Needless when mmengine reads with `weights_only=True` alone and keeps metadata.
    - `keep_stored_configs_from_running`: `Config.fromstring`, which the hosts call for configs inside checkpoints only,
      parses values and runs nothing; inferencers want a config beside the file. Needless when mmengine does both.
    - `save_checkpoints_safely`: a checkpoint and `last_checkpoint` are replaced as a whole, and the old checkpoint is
      deleted after the new one is complete, so that a process killed at any moment leaves one to resume from. Needless
      when mmengine's CheckpointHook and `save_checkpoint`, which write in place in 0.10.12, do the same.
    - `keep_outputs_apart`: visualizers and inferencers name files after the image's name alone; two images of one name
      in different folders get a file each. Needless when the hosts' names carry the image's folder.
    - `read_label_maps_as_they_are`: MMSegmentation 1.4 casts label maps to one byte, so that 300 becomes 44 before
      anyone can check it, and reads a file with channels as one without. Values up to 65,535 are kept, other files
      refused by name. Needless when MMSegmentation's LoadAnnotations checks what it casts.
    - `take_any_array`: the inferencers take arrays of one and four channels and of 16 bits as they take files, and name
      those that are no images. `value_range` of `mmvim.LoadImageFromFile`, whose type they replace, is kept. Needless
      when the hosts check arrays.
    - `mix_any_images`: Mosaic, MixUp and CopyPaste draw one image too many and fail on it; CopyPaste fails on images of
      different size, and the first two leave masks behind, which is refused. Needless when MMDetection draws below the
      length, fits the source, and moves masks.
    """
    register_packages()
    keep_host_scope()
    serve_missing_ops()
    read_checkpoints_safely()
    keep_stored_configs_from_running()
    save_checkpoints_safely()
    keep_outputs_apart()
    read_label_maps_as_they_are()
    take_any_array()
    mix_any_images()


prepare_hosts = install  # its former name

__all__ = ['MissingOpError', 'explain_transformers', 'install', 'prepare_hosts', 'require']
