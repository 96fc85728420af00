"""One life of Flower's SuperNode, for clients.supernode to start again.

Flower's own command leaves a thread running when it loses its server for good, and so never ends; here it does.

    python -m clients.node [OPTIONS OF flower-supernode]
"""

from __future__ import annotations

import os

from flwr.supernode.cli import flower_supernode

from fedxmr.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    flower_supernode()
    os._exit(1)
