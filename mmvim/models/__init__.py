"""Backbones, necks and layers; needs torch and mmengine only."""
