"""`python -m kinvec VERB …`, and with it `torchrun -m kinvec VERB …`: the `kinvec` command."""

from kinvec.cli import main

main()
