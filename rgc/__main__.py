"""What does ``python -m rgc`` run? The same as the command ``rgc``."""

from rgc.cli import main

if __name__ == "__main__":
    main()
