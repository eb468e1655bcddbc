"""The run that makes the model of ``qwen2vl.assets``: its shape, its plan, and what it reached."""
