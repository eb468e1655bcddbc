"""The console script ``qwen2vl``, also ``python -m qwen2vl``. What it imports at its top is what Ctrl-C may not end."""

from .interrupts import command


def main() -> None:
    """Run the command line."""
    with command():
        from .cli import main as run

        run()


if __name__ == "__main__":
    main()
