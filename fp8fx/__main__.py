"""`python -m fp8fx` is the command `fp8fx`."""

from fp8fx.cli import main

if __name__ == "__main__":
    main()
