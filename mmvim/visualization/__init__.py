"""Visualizers. Those derived from MMDetection's are in modules that the registry imports by name."""
