"""Makes ``python -m stepdistill`` the same as the ``stepdistill`` command."""

from __future__ import annotations

from stepdistill.cli import main


if __name__ == "__main__":
    main()
