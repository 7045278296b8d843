"""FedKeel: federated fine-tuning of language models that keeps its course when the sites' data differ."""

__version__ = "0.1.0"
