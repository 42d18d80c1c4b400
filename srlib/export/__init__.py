"""Trained networks in other tools: model hubs, ONNX, MONAI bundles, nnU-Net.

Nothing else in `srlib` imports this package, and onnx and nnunetv2 are imported only where they are used.
"""
