"""`python -m fastattn.cli`."""

from fastattn.cli import main

if __name__ == "__main__":
    main()
