"""Model families: everything that knows how one kind of FLUX is built."""
