"""``python -m consumer``: the same as the command ``tierstream``."""

from consumer.cli import main

if __name__ == "__main__":
    main()
