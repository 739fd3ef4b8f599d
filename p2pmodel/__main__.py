"""`python -m p2pmodel` is `p2pmodel`."""

from p2pmodel.cli.app import main

if __name__ == "__main__":
    main()
