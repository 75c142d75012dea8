"""The flags of `megasd submit`."""

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a flag leaves open is the site file's to say."""
    parser.add_argument("items", nargs="*", metavar="CONFIG | key=value")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="that train (1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="one rank each")
    parser.add_argument("--time", metavar="LIMIT", help="as Slurm writes it: 4:00:00, 2-12")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, one after the other, one run"
    )
    parser.add_argument("--image", help="container that the ranks run in")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="HOST[:CONTAINER]", help="repeatable"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="repeatable"
    )
    parser.add_argument("--site", metavar="FILE", help="habits of the cluster: slurm/sites/*.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all, print the script; needs no Slurm"
    )
    parser.add_argument("--via", choices=("sbatch", "nemo-run"), default="sbatch")
