"""``python -m flashcore``: the command line without the console script installed."""

from flashcore.cli import main

if __name__ == "__main__":
    main()
