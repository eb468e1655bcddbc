"""The small model that comes with the package: its shape, how it is trained, and where it lies."""
