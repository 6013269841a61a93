"""Heads; each derives from a host's, hence is imported only when a config names it (`mmvim.registry.HOST_PARTS`)."""
