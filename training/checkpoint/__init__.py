"""Checkpoints that no layout owns: tensors in global coordinates, committed by a manifest."""
