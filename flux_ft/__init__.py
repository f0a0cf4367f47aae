"""flux_ft: fine-tune FLUX image models on your own GPUs."""

__version__ = "0.1.0"
