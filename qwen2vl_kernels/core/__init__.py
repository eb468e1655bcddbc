"""What every op needs beside its kernels: backends and their choice, checks, registration, launching, tile plans."""
