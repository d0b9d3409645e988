"""Pages: one file a noun, each with a `router`."""
