"""What a trained model is worth: bits per byte, multiple choice, exact match, HumanEval; and an adapter for lm-eval [§4.4,
§5]."""
