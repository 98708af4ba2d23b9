"""One of two processes with two devices each, that evaluate and sample together.

``two_processes.py COMMAND ID PORT ARGUMENT …`` runs a command with parts of the parameters on each
device.
"""

import sys

import tiny_run  # puts the commands on the path

from sedd.__main__ import main
from sedd.networks import mesh

mesh.LEAST_SPLIT = 16

if __name__ == "__main__":
    assert tiny_run.ROOT
    command, process_id, port, *arguments = sys.argv[1:]
    together = ["--coordinator", f"localhost:{port}", "--num-processes", "2"]
    sys.argv = ["sedd", command, *arguments, *together, "--process-id", process_id]
    main()
