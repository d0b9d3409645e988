"""JSON under /api: one file a noun, each with a `router`."""
