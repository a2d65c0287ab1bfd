"""``python -m papers``."""

from papers.cli import main

if __name__ == "__main__":
    main()
