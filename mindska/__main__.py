"""`python -m mindska COMMAND ...` is `mindska COMMAND ...`."""

from mindska.commands import main

if __name__ == "__main__":
    main()
