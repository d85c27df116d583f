"""`python -m ppvision.dashboard RUN...`: VisualDL over runs, until it is stopped."""

from ppvision.engine.dashboard import main

if __name__ == "__main__":
    main()
