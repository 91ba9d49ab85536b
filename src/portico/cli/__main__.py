"""`python -m portico.cli`: how the supervisor starts its children."""

from portico.cli.main import main

if __name__ == "__main__":
    main()
