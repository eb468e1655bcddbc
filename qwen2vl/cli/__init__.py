"""The command line ``qwen2vl``: generate, chat, info, inspect. Model code loads inside the commands."""

from .app import app, main

__all__ = ["app", "main"]
