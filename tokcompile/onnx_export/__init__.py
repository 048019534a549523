"""Rewritten models as ONNX: standard operators only, checked, with names that a runtime can rely on."""
