"""Schemes -> Hugging Face checkpoints in ModelOpt's layout."""
