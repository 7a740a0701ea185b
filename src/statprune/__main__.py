"""`python -m statprune`, and the installed command."""

import sys


def main() -> int:
    """The exit status. Nothing is imported before an interrupt has its one line and its status."""
    try:
        from statprune.commands.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
