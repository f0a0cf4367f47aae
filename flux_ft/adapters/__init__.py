"""LoRA: attaching, files of every flavour."""
