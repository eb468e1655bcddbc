"""The Triton kernels with their launchers and configurations, a file for each."""
