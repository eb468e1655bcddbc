"""Empty of code: the adapter of one stack must not import another's. Each is imported by its own name."""
