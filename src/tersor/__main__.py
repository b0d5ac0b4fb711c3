"""`python -m tersor`, which is also what `accelerate launch -m tersor` starts."""

from tersor.cli import main

if __name__ == "__main__":
    main()
