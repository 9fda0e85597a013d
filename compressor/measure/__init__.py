"""Artifacts measured at rest, each in a fresh process that holds only onnxruntime and numpy."""
