"""Pictures and captions in, cached examples out."""
