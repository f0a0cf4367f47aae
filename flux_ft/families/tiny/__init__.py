"""flux-tiny: the real FLUX.1 classes at toy size, and the procedural world they draw."""
