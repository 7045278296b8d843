"""What a model is worth: metrics, scoring, damage."""
