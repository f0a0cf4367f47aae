"""`python -m flux_ft`, and what `accelerate launch -m flux_ft` starts."""

from flux_ft.cli import main

if __name__ == "__main__":
    main()
