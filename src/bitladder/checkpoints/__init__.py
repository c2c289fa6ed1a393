"""Schemes -> Hugging Face checkpoints in ModelOpt's layout, or in compressed-tensors'."""
