"""Train InternVL: `python train.py --help` lists the configuration."""

from ivl_lightning.cli.train import main

if __name__ == "__main__":
    main()
