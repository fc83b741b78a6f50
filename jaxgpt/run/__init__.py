"""What a long run needs and a reader may skip: checkpoints, digests, guards, processes, launchers."""
