"""Calibration and held-out samples: text, pairs, chat, what the model wrote."""
