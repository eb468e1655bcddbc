"""A laboratory, importable from the checkout and not installed: the embedded model's run, ablations, the demo."""
