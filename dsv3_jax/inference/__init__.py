"""Inference and deployment [§3.4]: a trained model at work."""
