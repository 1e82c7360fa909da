"""`python -m atlas_rl`: the same as the command `atlas-rl`."""

from atlas_rl.cli import main

if __name__ == "__main__":
    main()
