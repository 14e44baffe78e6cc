"""``python -m locoprop_torch.demo``."""

from locoprop_torch.demo.command import main

if __name__ == "__main__":
    main()
