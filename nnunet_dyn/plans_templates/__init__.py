"""Overlays on the architecture block of nnU-Net plans, one JSON file a method."""
